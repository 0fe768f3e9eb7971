"""llama.cpp's HTTP server on a GGUF file, as a program: `llama_server.py FILE PORT CONTEXT`."""

from __future__ import annotations

import sys
import threading

import xllamacpp


def main(gguf: str, port: str, context: str) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.hostnames, params.port = ["127.0.0.1"], int(port)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = int(context), 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    params.verbosity = 0
    server = xllamacpp.Server(params)
    print(f"Listening on {server.listening_address}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
