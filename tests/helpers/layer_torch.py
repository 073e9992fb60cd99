"""A decoder layer with PyTorch's operators on a CPU: FP16 products, float32 norms, its own softmax, sigmoid, top-k.

Written beside `layer_twin`, from the description in docs/formats.md; float weights and W8A8_DYNAMIC.
"""

import numpy as np
import torch
from torch.nn import functional


class TorchLayer:
    """The layer of one case."""

    def __init__(self, case):
        self.case, self.config = case, case.config
        self.w = {name: torch.from_numpy(x.copy()) for name, x in case.tensors.items()}
        self.out: dict[str, torch.Tensor] = {}

    def product(self, name: str, x: torch.Tensor, *weights: str) -> torch.Tensor:
        """FP16 by FP16 as PyTorch multiplies them, or integers."""
        if self.case.kinds[weights[0]] == "FLOAT":
            self.out[name] = torch.cat([functional.linear(x, self.w[f"{w}.weight"]) for w in weights], dim=-1)
            return self.out[name]
        x = x.float()
        scale = x.abs().amax(dim=-1) / 127
        a = torch.round(x / scale[..., None]).clamp(-128, 127).to(torch.int8)
        self.out[f"{name}.integers"], self.out[f"{name}.token_scale"] = a, scale
        parts = []
        for w in weights:
            sums = a.int() @ self.w[f"{w}.weight"].int().T
            parts.append(sums.float() * self.w[f"{w}.weight_scale"][:, 0] * scale[..., None])
        self.out[name] = torch.cat(parts, dim=-1).half()
        return self.out[name]

    def norm(self, name: str, x: torch.Tensor, weight: str, eps: float) -> torch.Tensor:
        gamma = self.w[f"{weight}.weight"].float()
        self.out[name] = functional.rms_norm(x.float(), gamma.shape, gamma, eps).half()
        return self.out[name]

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        config, size = self.config, self.config.qk_rope_head_dim
        yarn = config.yarn
        plain = config.rope_theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)

        def where(turns: float) -> float:
            longest = torch.tensor(yarn.original_max_position_embeddings / (turns * 2 * torch.pi), dtype=torch.float64)
            return float(
                size * torch.log(longest) / (2 * torch.log(torch.tensor(config.rope_theta, dtype=torch.float64)))
            )

        low, high = np.floor(where(yarn.beta_fast)), np.ceil(where(yarn.beta_slow))
        slow = ((torch.arange(size // 2) - low) / (high - low)).clamp(0, 1)
        omega = (plain * (1 - slow) + plain / yarn.factor * slow).float()
        turn = torch.polar(torch.ones(len(x), size // 2), self.w["position"].float()[:, None] * omega)
        turn = turn if x.ndim == 2 else turn[:, None]
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous()) * turn
        return torch.cat([pairs.real, pairs.imag], dim=-1).half()

    def mlp(self, prefix: str, x: torch.Tensor, where: str) -> torch.Tensor:
        gate, up = self.product(f"{prefix}gate_up", x, f"{where}gate_proj", f"{where}up_proj").chunk(2, dim=-1)
        self.out[f"{prefix}activated"] = (functional.silu(gate.float()) * up.float()).half()
        return self.product(f"{prefix}down", self.out[f"{prefix}activated"], f"{where}down_proj")

    def experts(self, x: torch.Tensor) -> torch.Tensor:
        config = self.config
        logits = functional.linear(x.float(), self.w["mlp.gate.weight"])
        score = logits.sigmoid()
        choice = score + self.w["mlp.gate.e_score_correction_bias"]
        groups = choice.view(len(x), config.n_group, -1)
        best = groups.topk(2, dim=-1)[0].sum(dim=-1).topk(config.topk_group, dim=-1)[1]
        is_in = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter(1, best, True)
        choice = choice.masked_fill(~is_in.repeat_interleave(groups.shape[2], dim=1), float("-inf"))
        index = choice.topk(config.num_experts_per_tok, dim=-1)[1]
        weight = score.gather(1, index)
        weight = weight / (weight.sum(dim=-1, keepdim=True) + 1e-20) * config.routed_scaling_factor
        self.out |= {"router_logits": logits, "expert_index": index.int(), "expert_weight": weight}
        rows: dict[str, list] = {}
        for t, chosen in enumerate(index.tolist()):
            for e in chosen:
                one = TorchLayer(self.case)
                one.mlp("expert_", x[t : t + 1], f"mlp.experts.{e}.")
                for name, y in one.out.items():
                    rows.setdefault(name, []).append(y[0])
        for name, some in rows.items():
            whole = torch.stack(some).unflatten(0, index.shape)
            is_per_token = name in ("expert_gate_up.integers", "expert_gate_up.token_scale")
            self.out[name] = whole[:, 0] if is_per_token else whole
        return (self.out["expert_down"].float() * weight[..., None]).sum(dim=1).half()

    def compute(self) -> dict[str, np.ndarray]:
        config, hidden, t = self.config, self.w["hidden"], len(self.w["hidden"])
        n, d, v, c = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank
        x = q = self.norm("input_norm", hidden, "input_layernorm", config.rms_norm_eps)
        if config.q_lora_rank is not None:
            low = self.product("q_a", x, "self_attn.q_a_proj")
            q = self.norm("q_a_norm", low, "self_attn.q_a_layernorm", 1e-6)
        q = self.product("q", q, f"self_attn.{'q_proj' if config.q_lora_rank is None else 'q_b_proj'}").view(t, n, -1)
        self.out["q"] = q
        query = torch.cat([q[..., :d], self.rotated(q[..., d:])], dim=-1)
        kv = self.product("kv_a", x, "self_attn.kv_a_proj_with_mqa")
        c_kv = self.norm("c_kv", kv[:, :c], "self_attn.kv_a_layernorm", 1e-6)
        k_rope = self.rotated(kv[:, c:])
        key, value = (
            functional.linear(c_kv, self.w["self_attn.kv_b_proj.weight"]).view(t, n, d + v).split([d, v], dim=-1)
        )
        whole = torch.cat([key, k_rope[:, None].expand(t, n, -1)], dim=-1)
        score = torch.einsum("tnd,snd->tns", query.float(), whole.float()) * config.softmax_scale
        score = score.masked_fill(~torch.ones(t, t, dtype=torch.bool).tril()[:, None], float("-inf"))
        attention = torch.einsum("tns,snv->tnv", score.softmax(dim=-1), value.float()).half()
        self.out |= {"query": query, "k_rope": k_rope, "key": key, "value": value, "attention": attention}
        self.out["lse"] = score.logsumexp(dim=-1)
        o = self.product("o", attention.reshape(t, -1), "self_attn.o_proj")
        attended = self.out["attended"] = hidden + o
        x = self.norm("post_norm", attended, "post_attention_layernorm", config.rms_norm_eps)
        if not self.case.is_moe:
            self.out["out"] = attended + self.mlp("", x, "mlp.")
        else:
            routed = self.out["routed"] = self.experts(x)
            shared = self.mlp("shared_", x, "mlp.shared_experts.")
            self.out["out"] = (attended.float() + routed.float() + shared.float()).half()
        return {name: y.contiguous().numpy() for name, y in self.out.items()}


def layer(case) -> dict[str, np.ndarray]:
    """Every tensor of a result."""
    with torch.no_grad():
        return TorchLayer(case).compute()
