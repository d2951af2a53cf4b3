"""OpenAI-compatible HTTP over the inference engine, its metrics, and a page to talk to a model."""
