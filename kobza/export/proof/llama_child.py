"""The process in which llama.cpp runs: a file that is not what it says can bring it down, and this process is all that falls.

Run as a script by llama_cpp.py, never imported by kobza. The first line of stdin says what to serve, as JSON: {"model", "n_ctx",
"n_threads", "lora", "key"}. The first line of stdout says where, once it does; whatever llama.cpp prints goes to stderr. It lives
as long as stdin is open: when the parent dies, by whatever means, the system closes it.
"""

import json
import os
import sys
import threading


def main():
    """Serve until the parent is gone."""
    asked = json.loads(sys.stdin.readline())
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    threading.Thread(target=leave_with_parent, daemon=True).start()
    import xllamacpp

    server = xllamacpp.Server(parameters(xllamacpp, asked))  # held: it serves as long as it is
    print(json.dumps({"address": server.listening_address}), file=answer, flush=True)
    threading.Event().wait()


def leave_with_parent():
    """End the process when nobody holds the other end of stdin."""
    while os.read(0, 4096):  # not sys.stdin, whose lock would abort a process that ends while this waits
        pass
    os._exit(0)


def parameters(xllamacpp, asked):
    """One sequence at a time, nothing rounded that the file does not round, and every number computed by the plain way."""
    wanted = xllamacpp.CommonParams()
    wanted.model.path = asked["model"]
    wanted.n_ctx = asked["n_ctx"]
    wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = asked["n_threads"]
    wanted.api_keys = [asked["key"]]  # the port is open to every process of the machine
    if asked["lora"]:
        wanted.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(asked["lora"], 1.0)]
    wanted.cache_type_k = wanted.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    wanted.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    wanted.n_parallel, wanted.n_gpu_layers, wanted.verbosity = 1, 0, 1
    wanted.swa_full = True  # else a window's cache forgets the prefix that the next request goes on from
    wanted.cache_ram_mib = wanted.n_ctx_checkpoints = 0
    wanted.warmup = wanted.fit_params = wanted.cache_idle_slots = wanted.ui = False
    return wanted


if __name__ == "__main__":
    main()
