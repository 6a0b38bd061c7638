"""The worker's own part: runs in its main process, beside any pool."""
