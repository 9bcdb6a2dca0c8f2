"""OpenVINO in the inference bench: the folder's llama model as a graph of its operations, its matrices in int8 or int4.

The graph is what its own converter makes of such a model: compressed constants, a stateful cache with a row of beam
indices, fused attention. int8: one scale and zero point per row; int4: symmetric, one scale per 128 inputs.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy
import torch

from trivium.bench.inference_worker import serve

GROUP = 128


class Graph:
    """Builds the model operation by operation; ``step_bytes`` counts the matrices as they are added."""

    def __init__(self, folder: Path, form: str) -> None:
        import openvino
        from openvino import opset13

        self.config = json.loads((folder / "config.json").read_text())
        if self.config["model_type"] != "llama":
            raise NotImplementedError(f"only llama shapes are written for OpenVINO, not {self.config['model_type']}")
        self._ov: Any = openvino
        self._op: Any = opset13
        self._form = form
        self._folder = folder
        self.step_bytes = 0
        self._sinks: list[Any] = []

    def build(self) -> Any:
        """The model: input_ids, position_ids [batch, tokens], beam_idx [batch] → logits [batch, 1, vocabulary]."""
        from safetensors import safe_open

        op, config = self._op, self.config
        (file,) = self._folder.glob("*.safetensors")
        with safe_open(file, "pt") as tensors:
            self._get = tensors.get_tensor
            ids = op.parameter([-1, -1], numpy.int64, name="input_ids")
            positions = op.parameter([-1, -1], numpy.int64, name="position_ids")
            beams = op.parameter([-1], numpy.int32, name="beam_idx")
            table = op.convert(self._constant(self._get("model.embed_tokens.weight").half().numpy()), "f32")
            x = op.gather(table, ids, self._integer(0))
            turn = self._angles(positions)
            for layer in range(config["num_hidden_layers"]):
                name = f"model.layers.{layer}."
                x = op.add(x, self._attention(name, layer, self._norm(x, name + "input_layernorm"), turn, ids, beams))
                h = self._norm(x, name + "post_attention_layernorm")
                gate = op.swish(self._linear(h, name + "mlp.gate_proj"))
                inner = op.multiply(gate, self._linear(h, name + "mlp.up_proj"))
                x = op.add(x, self._linear(inner, name + "mlp.down_proj"))
            last = op.gather(self._norm(x, "model.norm"), self._constant(numpy.array([-1])), self._integer(1))
            logits = op.result(self._linear(last, "lm_head"))
        return self._ov.Model([logits], self._sinks, [ids, positions, beams], "llama")

    def _constant(self, array: numpy.ndarray) -> Any:
        return self._op.constant(array)

    def _integer(self, value: int) -> Any:
        return self._op.constant(numpy.array(value, dtype=numpy.int64))

    def _norm(self, x: Any, name: str) -> Any:
        op = self._op
        square = op.reduce_mean(op.power(x, numpy.float32(2.0)), numpy.array([-1]), keep_dims=True)
        root = op.sqrt(op.add(square, numpy.float32(self.config["rms_norm_eps"])))
        scaled = op.multiply(x, op.divide(numpy.float32(1.0), root))
        return op.multiply(scaled, self._constant(self._get(f"{name}.weight").float().numpy()))

    def _linear(self, x: Any, name: str) -> Any:
        weight = self._get(f"{name}.weight").float()
        return self._op.matmul(x, self._int8(weight) if self._form == "int8" else self._int4(weight), False, True)

    def _int8(self, weight: torch.Tensor) -> Any:
        op = self._op
        low, high = weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True)
        scale = ((high - low) / 255.0).clamp(min=1e-12)
        zero = (-low / scale).round().clamp(0, 255)
        quants = (weight / scale + zero).round().clamp(0, 255).to(torch.uint8).numpy()
        self.step_bytes += quants.nbytes + 3 * len(quants)
        shifted = op.subtract(
            op.convert(self._constant(quants), "f16"),
            op.convert(self._constant(zero.to(torch.uint8).numpy()), "f16"),
        )
        return op.convert(op.multiply(shifted, self._constant(scale.half().numpy())), "f32")

    def _int4(self, weight: torch.Tensor) -> Any:
        op, ov = self._op, self._ov
        rows, columns = weight.shape
        group = math.gcd(columns, GROUP)
        grouped = weight.view(rows, columns // group, group)
        at = grouped.abs().argmax(dim=2, keepdim=True)
        scale = grouped.gather(2, at) / -8.0
        scale = torch.where(scale == 0, 1e-8, scale)
        quants = (grouped / scale).round().clamp(-8, 7).to(torch.int8).numpy().reshape(-1)
        packed = ((quants[0::2] & 15) | (quants[1::2] << 4)).astype(numpy.uint8)
        self.step_bytes += packed.nbytes + 2 * scale.numel()
        held = ov.Tensor(ov.Type.i4, ov.Shape(list(grouped.shape)))
        held.data[:] = packed.reshape(held.data.shape)
        data = ov.op.Constant(held)
        wide = op.multiply(op.convert(data, "f16"), self._constant(scale.half().numpy()))
        return op.convert(op.reshape(wide, numpy.array([rows, columns]), False), "f32")

    def _angles(self, positions: Any) -> tuple[Any, Any]:
        op = self._op
        width = self.config["hidden_size"] // self.config["num_attention_heads"]
        base = self.config.get("rope_theta") or self.config["rope_parameters"]["rope_theta"]
        inverse = (float(base) ** -(numpy.arange(0, width, 2) / width)).astype(numpy.float32)
        angles = op.multiply(
            op.unsqueeze(op.convert(positions, "f32"), self._integer(-1)), self._constant(inverse.reshape(1, 1, -1))
        )
        angles = op.concat([angles, angles], -1)
        return op.unsqueeze(op.cos(angles), self._integer(1)), op.unsqueeze(op.sin(angles), self._integer(1))

    def _turned(self, x: Any, turn: tuple[Any, Any], width: int) -> Any:
        op = self._op
        one = numpy.array([1])
        first = op.slice(x, numpy.array([0]), numpy.array([width // 2]), one, numpy.array([3]))
        second = op.slice(x, numpy.array([width // 2]), numpy.array([2**31 - 1]), one, numpy.array([3]))
        half = op.concat([op.multiply(second, numpy.float32(-1.0)), first], -1)
        return op.add(op.multiply(x, turn[0]), op.multiply(half, turn[1]))

    def _heads(self, x: Any, count: int, width: int) -> Any:
        op = self._op
        return op.transpose(op.reshape(x, numpy.array([0, 0, count, width]), True), numpy.array([0, 2, 1, 3]))

    def _attention(self, name: str, layer: int, h: Any, turn: tuple[Any, Any], ids: Any, beams: Any) -> Any:
        op, config = self._op, self.config
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        width = config["hidden_size"] // heads
        query = self._turned(self._heads(self._linear(h, name + "self_attn.q_proj"), heads, width), turn, width)
        key = self._turned(self._heads(self._linear(h, name + "self_attn.k_proj"), kv_heads, width), turn, width)
        value = self._heads(self._linear(h, name + "self_attn.v_proj"), kv_heads, width)
        key = self._kept(key, f"key.{layer}", ids, beams, kv_heads, width)
        value = self._kept(value, f"value.{layer}", ids, beams, kv_heads, width)
        mask = self._mask(query, key)
        wide = [self._repeated(t, kv_heads, heads // kv_heads, width) for t in (key, value)]
        seen = op.scaled_dot_product_attention(query, wide[0], wide[1], mask)
        flat = op.reshape(op.transpose(seen, numpy.array([0, 2, 1, 3])), numpy.array([0, 0, heads * width]), True)
        return self._linear(flat, name + "self_attn.o_proj")

    def _kept(self, fresh: Any, name: str, ids: Any, beams: Any, heads: int, width: int) -> Any:
        """The cache's rows, in the order of the beams, with ``fresh`` ones behind; kept for the next call."""
        from openvino.op.util import Variable, VariableInfo

        op, ov = self._op, self._ov
        info = VariableInfo()
        info.data_shape = ov.PartialShape([-1, heads, -1, width])
        info.data_type = ov.Type.f32
        info.variable_id = name
        variable = Variable(info)
        batch = op.gather(op.shape_of(ids, "i64"), self._constant(numpy.array([0])), self._integer(0))
        shape = op.concat([batch, numpy.array([heads]), numpy.array([0]), numpy.array([width])], 0)
        empty = op.broadcast(numpy.float32(0.0), shape)
        past = op.gather(op.read_value(empty, variable), beams, self._integer(0))
        whole = op.concat([past, fresh], 2)
        self._sinks.append(op.assign(whole, variable))
        return whole

    def _repeated(self, x: Any, kv_heads: int, times: int, width: int) -> Any:
        op = self._op
        if times == 1:
            return x
        wide = op.unsqueeze(x, self._integer(2))
        shape = op.shape_of(x, "i64")
        part = [op.gather(shape, self._constant(numpy.array([i])), self._integer(0)) for i in range(4)]
        target = op.concat([part[0], part[1], numpy.array([times]), part[2], part[3]], 0)
        return op.reshape(
            op.broadcast(wide, target, "BIDIRECTIONAL"), numpy.array([0, kv_heads * times, -1, width]), True
        )

    def _mask(self, query: Any, key: Any) -> Any:
        """[1, 1, tokens, keys]: 0 where a key is not later than its query, else the lowest number."""
        op = self._op
        lengths = [op.gather(op.shape_of(t, "i64"), self._integer(2), self._integer(0)) for t in (query, key)]
        columns = op.range(self._integer(0), lengths[1], self._integer(1), "i64")
        rows = op.range(op.subtract(lengths[1], lengths[0]), lengths[1], self._integer(1), "i64")
        seen = op.less_equal(op.unsqueeze(columns, self._integer(0)), op.unsqueeze(rows, self._integer(1)))
        mask = op.select(seen, numpy.float32(0.0), numpy.float32(numpy.finfo(numpy.float32).min))
        return op.unsqueeze(mask, self._constant(numpy.array([0, 1])))


class OpenVino:
    """The compiled model and one request with its cache."""

    def __init__(self, folder: str, form: str, threads: int, way: str) -> None:
        import openvino

        graph = Graph(Path(folder), form)
        model = graph.build()
        self.step_bytes = graph.step_bytes
        self.kernels = f"OpenVINO {openvino.__version__}"
        self._vocabulary = graph.config["vocab_size"]
        core = openvino.Core()
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self._request = core.compile_model(model, "CPU", settings).create_infer_request()

    def _run(self, ids: numpy.ndarray, start: int) -> numpy.ndarray:
        batch, tokens = ids.shape
        positions = numpy.broadcast_to(numpy.arange(start, start + tokens), ids.shape)
        given = {"input_ids": ids, "position_ids": numpy.ascontiguousarray(positions)}
        given["beam_idx"] = numpy.arange(batch, dtype=numpy.int32)
        self._request.infer(given)
        logits: numpy.ndarray = self._request.get_output_tensor(0).data[:, -1]
        return logits

    def _prompts(self, batch: int, tokens: int) -> numpy.ndarray:
        rows = [[(s * 31 + i * 7) % self._vocabulary for i in range(tokens)] for s in range(batch)]
        return numpy.array(rows, dtype=numpy.int64)

    def decode(self, batch: int, context: int, steps: int) -> list[float]:
        """See `inference_worker.Contestant`."""
        self._request.reset_state()
        ids = self._run(self._prompts(batch, context), 0).argmax(axis=1)[:, None]
        times = []
        for step in range(steps + 1):
            start = time.perf_counter()
            ids = self._run(ids, context + step).argmax(axis=1)[:, None]
            if step:
                times.append(time.perf_counter() - start)
        return times

    def prefill(self, tokens: int) -> float:
        """See `inference_worker.Contestant`."""
        self._request.reset_state()
        start = time.perf_counter()
        self._run(self._prompts(1, tokens), 0).argmax(axis=1)
        return time.perf_counter() - start


if __name__ == "__main__":
    serve(OpenVino)
