"""Where pipelines run: skeletons, views, bind, the baton. Knows no socket."""
