"""Models over HTTP: the Open Inference Protocol, version 2, with dynamic batching. How to use it: docs/serve.md."""
