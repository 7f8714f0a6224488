"""The vision-language teacher: any open_clip model, its stand-in, its text weights and its store of embeddings."""
