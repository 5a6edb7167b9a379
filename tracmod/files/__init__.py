"""Files: atomic writes, checksums, locations on disk or object storage, cached tensors."""
