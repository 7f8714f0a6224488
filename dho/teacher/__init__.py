"""The vision-language teacher: any open_clip model, its stand-in, its zero-shot weights and its store of embeddings."""
