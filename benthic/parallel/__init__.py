"""Work spread over devices, as functions applied to a model from outside."""
