"""What every room uses: errors, files, tensors, progress, retries, processes and the workspace."""
