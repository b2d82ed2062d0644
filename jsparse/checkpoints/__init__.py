"""Models on disk: our own directories, and any path that `load` takes."""
