"""llama.cpp in the inference bench: its C interface, on a GGUF file written from the same weights."""

from __future__ import annotations

import ctypes
import json
import time
from pathlib import Path
from typing import Any

import torch

from trivium.bench.inference_worker import serve


def write_gguf(folder: Path, form: str, path: Path) -> int:
    """The folder's llama model with its matrices in ``form``; returns the bytes of those that a step reads."""
    import gguf
    import numpy
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "llama":
        raise NotImplementedError(f"only llama shapes are written as GGUF, not {config['model_type']}")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    kind = gguf.GGMLQuantizationType[form]
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    step_bytes = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name).float()
                stem = name.removesuffix(".weight")
                if stem.startswith("model.layers."):
                    _, _, layer, rest = stem.split(".", 3)
                    # llama.cpp turns neighbouring columns, Hugging Face halves: rows of q and k change places.
                    if rest in ("self_attn.q_proj", "self_attn.k_proj"):
                        count = heads if rest.endswith("q_proj") else kv_heads
                        tensor = tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
                    target = f"blk.{layer}.{names[rest]}"
                else:
                    target = names[stem]
                array = tensor.numpy()
                if array.ndim > 1:
                    packed = gguf.quants.quantize(array, kind)
                    writer.add_tensor(f"{target}.weight", packed, raw_dtype=kind)
                    step_bytes += 0 if target == "token_embd" else packed.nbytes
                else:
                    writer.add_tensor(f"{target}.weight", array.astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return step_bytes


class LlamaCpp:
    """A context of llama.cpp with room for 16 sequences. ``way`` "plain": without its own layouts of the weights."""

    def __init__(self, folder: str, form: str, threads: int, way: str) -> None:
        import llama_cpp

        path = Path(folder) / f"model-{form}.gguf"
        known = path.with_suffix(".bytes")
        if not known.exists():
            known.write_text(str(write_gguf(Path(folder), form, path)))
        self.step_bytes = int(known.read_text())
        self.kernels = f"llama.cpp of llama-cpp-python {llama_cpp.__version__}"
        self._lib: Any = llama_cpp
        self._silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.use_extra_bufts = way != "plain"
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 4096, 2048, 512, 16
        params.kv_unified = True  # else each sequence gets a sixteenth of the cells
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._vocabulary = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]

    def _run(self, tokens: list[tuple[int, int, int]]) -> None:
        """(token, position, sequence) each; the last of every sequence is asked for its logits."""
        batch = self._lib.llama_batch_init(len(tokens), 0, 1)
        last = {sequence: i for i, (_, _, sequence) in enumerate(tokens)}
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = last[sequence] == i
        code = self._lib.llama_decode(self._context, batch)
        self._lib.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode: {code}")

    def _best(self, row: int) -> int:
        pointer = self._lib.llama_get_logits_ith(self._context, row)
        array = (ctypes.c_float * self._vocabulary).from_address(ctypes.addressof(pointer.contents))
        return int(torch.frombuffer(array, dtype=torch.float32).argmax())

    def _clear(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def decode(self, batch: int, context: int, steps: int) -> list[float]:
        """See `inference_worker.Contestant`."""
        self._clear()
        for s in range(batch):
            self._run([((s * 31 + i * 7) % self._vocabulary, i, s) for i in range(context)])
        tokens = [1] * batch
        times = []
        for step in range(steps + 1):
            start = time.perf_counter()
            self._run([(token, context + step, s) for s, token in enumerate(tokens)])
            tokens = [self._best(s) for s in range(batch)]
            if step:
                times.append(time.perf_counter() - start)
        return times

    def prefill(self, tokens: int) -> float:
        """See `inference_worker.Contestant`."""
        self._clear()
        start = time.perf_counter()
        self._run([(i * 7 % self._vocabulary, i, 0) for i in range(tokens)])
        self._best(tokens - 1)
        return time.perf_counter() - start


if __name__ == "__main__":
    serve(LlamaCpp)
