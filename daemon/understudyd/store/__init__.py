"""Models on disk: content-addressed blobs, signatures, manifests (docs/architecture.md)."""
