"""transformers in the inference bench: its own forward with its own cache, the best token taken on the way."""

from __future__ import annotations

import time

import torch

from trivium.bench.inference_worker import serve


class Transformers:
    """A model of transformers in one dtype."""

    def __init__(self, folder: str, form: str, threads: int, way: str) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, form)).eval()
        self._device = "cuda" if way == "cuda" else "cpu"
        self._model.to(self._device)
        self.kernels = f"torch {self._device}"
        embedding = self._model.get_input_embeddings().weight
        total = sum(p.nbytes for p in self._model.parameters())
        tied = self._model.get_output_embeddings().weight is embedding
        experts = sum(p.nbytes for name, p in self._model.named_parameters() if ".experts." in name)
        config = self._model.config
        share = config.num_experts_per_tok / config.num_experts if experts else 1.0
        self.step_bytes = int(total - (0 if tied else embedding.nbytes) - experts * (1.0 - share))

    @torch.inference_mode()
    def decode(self, batch: int, context: int, steps: int) -> list[float]:
        """See `inference_worker.Contestant`."""
        ids = torch.randint(0, self._model.config.vocab_size, (batch, context), device=self._device)
        out = self._model(ids, use_cache=True, logits_to_keep=1)
        times = []
        for step in range(steps + 1):
            start = time.perf_counter()
            token = out.logits[:, -1].argmax(dim=1, keepdim=True)
            out = self._model(token, past_key_values=out.past_key_values, use_cache=True)
            self._wait()
            if step:
                times.append(time.perf_counter() - start)
        return times

    @torch.inference_mode()
    def prefill(self, tokens: int) -> float:
        """See `inference_worker.Contestant`."""
        ids = torch.randint(0, self._model.config.vocab_size, (1, tokens), device=self._device)
        start = time.perf_counter()
        self._model(ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(dim=1)
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


if __name__ == "__main__":
    serve(Transformers)
