"""LoRA adapters on disk: what a file may hold, how it becomes a blob and a record, which models it fits."""
