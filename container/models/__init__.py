"""Several models in one container, as SageMaker's multi-model endpoints load them, each with a server of its own."""
