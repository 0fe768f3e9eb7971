"""The doors of the product: the Gradio page and, beside it, the HTTP API."""
