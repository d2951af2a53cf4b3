"""A trained model at work: latent cache, sampling, the engine, the conversation."""
