"""PyTorch's `scaled_dot_product_attention` on this host's CPU: a third implementation, written by neither half.

It computes all keys at once, whatever cp is, and gives no lse.
"""

import importlib.util

import numpy as np

from cpjax.crosscheck.files.case import Case
from cpjax.crosscheck.files.result import Result
from cpjax.mask import PAD, Mask, visible

MOST_SCORES = 2**28
"""The mask is an array of this many booleans at most, for each batch row."""


class Sdpa:
    """FP16 inputs, an explicit mask, judged as `flash_fp16` without lse."""

    def supports(self, case: Case) -> str | None:
        """Not softcap, sink and ALiBi; a bias of FP16 numbers, as its dtype is the query's; no mask beyond memory."""
        if importlib.util.find_spec("torch") is None:
            return "PyTorch is not installed; pip install 'cpjax[torch]'"
        scores = case.query.shape[1] * case.key.shape[1]
        if scores > MOST_SCORES:
            return f"{scores:,} pairs of query and key; its mask is an array, of at most {MOST_SCORES:,}"
        others = [name for name in case.logit_options if name != "bias"]
        if others:
            return f"{' and '.join(others)}; scaled_dot_product_attention has none"
        with np.errstate(over="ignore"):
            if case.bias is not None and not np.array_equal(case.bias, case.bias.astype(np.float16)):
                return "a bias whose numbers are no FP16 numbers; its mask has the dtype of the query"
        return None

    def run(self, case: Case) -> Result:
        """One call of PyTorch's fused kernel."""
        import torch

        seen = np.array(visible(Mask(is_causal=case.is_causal, window=case.window), case.q_tokens, case.kv_tokens))
        # The mask hides no NaN in a value, since 0 · NaN is NaN; what a case stores in its pads is nobody's business.
        query, key, value = (
            torch.from_numpy(np.where((np.asarray(places.segment) != PAD)[..., None, None], x, np.float16(0)))
            for x, places in (
                (case.query, case.q_tokens), (case.key, case.kv_tokens), (case.value, case.kv_tokens)
            )
        )  # fmt: skip
        mask = torch.from_numpy(seen)[:, None]
        if case.bias is not None:
            mask = torch.from_numpy(case.bias.astype(np.float16)).masked_fill(~mask, -torch.inf)
        out = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (query, key, value)),
            attn_mask=mask,
            scale=case.scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        out = out.transpose(1, 2).contiguous().numpy()
        about = {"torch": torch.__version__, "device": f"cpu ({torch.backends.cpu.get_cpu_capability()})"}
        return Result("sdpa", case.precision.get("sdpa", "flash_fp16"), "together", out, None, about)
