"""Running models: the runtime itself, child processes, measurements, metrics and the paired tests behind a "yes".

Nothing is imported here: `ort` is the only module that loads onnxruntime, and a child process should not pay for
what it does not use.
"""
