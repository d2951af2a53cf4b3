"""Raw text in, training batches out: documents, tokenizer, token shards with a manifest, and batches."""
