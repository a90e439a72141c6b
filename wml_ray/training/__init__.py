"""One worker's training, without Ray and MLflow."""
