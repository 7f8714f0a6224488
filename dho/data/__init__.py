"""Images from their source to batches: catalogue, fetch, records, splits, shards and index, views, streams."""
