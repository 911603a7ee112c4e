"""Which parameters of models that people train go to AdamW."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import spectral_kernels as sk
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS, PLACES, WIDTH, INNER = 97, 12, 16, 24

Layers = dict[str, nn.Module | nn.Parameter]


def tree(layers: Layers, ties: tuple[tuple[str, str], ...] = ()) -> nn.Module:
    """A model with these layers at these places, in their order; blocks are in module lists."""
    root = nn.Module()
    for path, layer in layers.items():
        parts = path.split(".")
        node, name = root, parts[-1]
        for part, below in itertools.pairwise(parts):
            if part not in node._modules:
                node.add_module(part, nn.ModuleList() if below.isdigit() else nn.Module())
            node = node.get_submodule(part)
        if isinstance(layer, nn.Parameter):
            node.register_parameter(name, layer)
        else:
            node.add_module(name, layer)
    for one, other in ties:
        root.get_submodule(other).weight = root.get_submodule(one).weight
    return root


def own(name: str, **shapes: tuple[int, ...]) -> nn.Module:
    """A module of a class of that name with its own parameters."""
    module = type(name, (nn.Module,), {})()
    for attribute, shape in shapes.items():
        module.register_parameter(attribute, nn.Parameter(torch.zeros(shape)))
    return module


def linear(out: int = WIDTH, inner: int = WIDTH) -> nn.Linear:
    return nn.Linear(inner, out)


def words(width: int = WIDTH) -> nn.Embedding:
    return nn.Embedding(WORDS, width)


def places() -> nn.Embedding:
    return nn.Embedding(PLACES, WIDTH)


def raw(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def linears(prefix: str, *names: str) -> Layers:
    return {f"{prefix}.{name}": linear() for name in names}


def llama(**block: nn.Module) -> Layers:
    mlp = block or {"gate_proj": linear(INNER), "up_proj": linear(INNER)}
    return {
        "model.embed_tokens": words(),
        **linears("model.layers.0.self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
        **{f"model.layers.0.mlp.{name}": module for name, module in mlp.items()},
        "model.layers.0.input_layernorm": own("LlamaRMSNorm", weight=(WIDTH,)),
        "model.norm": own("LlamaRMSNorm", weight=(WIDTH,)),
        "lm_head": linear(WORDS),
    }


def bert() -> Layers:
    layer = "bert.encoder.layer.0"
    return {
        "bert.embeddings.word_embeddings": words(),
        "bert.embeddings.position_embeddings": places(),
        "bert.embeddings.token_type_embeddings": nn.Embedding(2, WIDTH),
        "bert.embeddings.LayerNorm": nn.LayerNorm(WIDTH),
        **linears(f"{layer}.attention.self", "query", "key", "value"),
        f"{layer}.attention.output.dense": linear(),
        f"{layer}.intermediate.dense": linear(INNER),
        f"{layer}.output.dense": linear(WIDTH, INNER),
        "cls.predictions.transform.dense": linear(),
        "cls.predictions.decoder": linear(WORDS),
    }


BERT = {"bert.embeddings.word_embeddings", "bert.embeddings.position_embeddings"} | {
    "bert.embeddings.token_type_embeddings"
}


def image(**last: nn.Module) -> Layers:
    return {
        "cls_token": raw(1, 1, WIDTH),
        "pos_embed": raw(1, 5, WIDTH),
        "patch_embed.proj": nn.Conv2d(3, WIDTH, 8, stride=8),
        "blocks.0.norm1": nn.LayerNorm(WIDTH),
        "blocks.0.attn.qkv": linear(3 * WIDTH),
        "blocks.0.attn.proj": linear(),
        "blocks.0.mlp.fc1": linear(INNER),
        "blocks.0.mlp.fc2": linear(WIDTH, INNER),
        "norm": nn.LayerNorm(WIDTH),
        **last,
    }


def hub(prefix: str) -> Callable[[], nn.Module]:
    """A transformer of torch's with a table and a head."""

    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(WIDTH, 2, INNER)
        return tree({f"{prefix}table": words(), "body": nn.TransformerEncoder(layer, 2)})

    return make


def seq2seq() -> nn.Module:
    return tree({"shared": words(), "transformer": nn.Transformer(WIDTH, 2, 1, 1, INNER)})


def experts(**shapes: tuple[int, ...]) -> dict[str, nn.Module]:
    return {"gate": own("TopKRouter", weight=(3, WIDTH)), "experts": own("MoeExperts", **shapes)}


def mamba() -> Layers:
    mixer = "backbone.layers.0.mixer"
    return {
        "backbone.embeddings": words(),
        f"{mixer}.A_log": raw(32, 4),
        f"{mixer}.D": raw(32),
        f"{mixer}.conv1d": nn.Conv1d(32, 32, 4, groups=32),
        f"{mixer}.in_proj": linear(64),
        f"{mixer}.x_proj": linear(9, 32),
        f"{mixer}.dt_proj": nn.Linear(1, 32),
        f"{mixer}.out_proj": linear(WIDTH, 32),
        "lm_head": linear(WORDS),
    }


def adaptive() -> Layers:
    """Norms and embeddings that are made by projections, as in diffusion transformers."""
    return {
        "x_embedder.proj": nn.Conv2d(4, WIDTH, 2, stride=2),
        "t_embedder.mlp": nn.Sequential(linear(), nn.SiLU(), linear()),
        "y_embedder.embedding_table": nn.Embedding(11, WIDTH),
        "pos_embed": raw(1, 4, WIDTH),
        "blocks.0.norm1.linear": linear(6 * WIDTH),
        "blocks.0.attn": nn.MultiheadAttention(WIDTH, 2),
        "blocks.0.adaLN_modulation": nn.Sequential(nn.SiLU(), linear(6 * WIDTH)),
        "norm_out.linear": linear(2 * WIDTH),
        "proj_out": linear(8),
    }


Row = tuple[Callable[[], nn.Module], set[str]]

# Parameters of two or more dimensions that AdamW takes; ".weight" is left out. "*" marks a batch of
# matrices, "+" a kernel that is flattened.
TABLE: dict[str, Row] = {
    "gpt2, tied": (
        lambda: tree(
            {
                "transformer.wte": words(),
                "transformer.wpe": places(),
                "transformer.h.0.attn.c_attn": own("Conv1D", weight=(WIDTH, 48), bias=(48,)),
                "transformer.h.0.mlp.c_fc": own("Conv1D", weight=(WIDTH, 64), bias=(64,)),
                "lm_head": nn.Linear(WIDTH, WORDS, bias=False),
            },
            (("transformer.wte", "lm_head"),),
        ),
        {"transformer.wte", "transformer.wpe"},
    ),
    "llama": (lambda: tree(llama()), {"model.embed_tokens", "lm_head"}),
    "llama by torchtitan": (
        lambda: tree(
            {
                "tok_embeddings": words(),
                **linears("layers.0.attention", "wq", "wk", "wv", "wo"),
                **linears("layers.0.feed_forward", "w1", "w2", "w3"),
                "norm": nn.RMSNorm(WIDTH),
                "output": linear(WORDS),
            }
        ),
        {"tok_embeddings", "output"},
    ),
    "mixtral": (
        lambda: tree(llama(**experts(gate_up_proj=(3, 48, 16), down_proj=(3, 16, 24)))),
        {"model.embed_tokens", "lm_head"}
        | {f"*model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")},
    ),
    "gpt-oss": (
        lambda: tree(llama(**experts(gate_up_proj=(3, 16, 48), gate_up_proj_bias=(3, 48)))),
        {"model.embed_tokens", "lm_head", "model.layers.0.mlp.experts.gate_up_proj_bias"}
        | {"*model.layers.0.mlp.experts.gate_up_proj"},
    ),
    "grouped experts with biases": (
        lambda: tree(llama(**experts(w1=(3, 24, 16), b1=(3, 24), b2=(3, 1, 16)))),
        {"model.embed_tokens", "lm_head"}
        | {f"model.layers.0.mlp.experts.{name}" for name in ("b1", "b2")}
        | {"*model.layers.0.mlp.experts.w1"},
    ),
    "bert, tied": (
        lambda: tree(bert(), (("bert.embeddings.word_embeddings", "cls.predictions.decoder"),)),
        BERT,
    ),
    "bert, untied": (lambda: tree(bert()), BERT | {"cls.predictions.decoder"}),
    "distilbert, untied": (
        lambda: tree(
            {
                "distilbert.embeddings.word_embeddings": words(),
                **linears("distilbert.transformer.layer.0.attention", "q_lin", "out_lin"),
                "vocab_transform": linear(),
                "vocab_layer_norm": nn.LayerNorm(WIDTH),
                "vocab_projector": linear(WORDS),
            }
        ),
        {"distilbert.embeddings.word_embeddings", "vocab_projector"},
    ),
    "modernbert, untied": (
        lambda: tree(
            {
                "model.embeddings.tok_embeddings": words(),
                **linears("model.layers.0.attn", "Wqkv", "Wo"),
                "head.norm": nn.LayerNorm(WIDTH),
                "decoder": linear(WORDS),
            }
        ),
        {"model.embeddings.tok_embeddings", "decoder"},
    ),
    "electra": (
        lambda: tree(
            {
                "electra.embeddings.word_embeddings": words(8),
                "electra.embeddings_project": linear(WIDTH, 8),
                "electra.encoder.layer.0.attention.self.query": linear(),
                "generator_predictions.dense": linear(8),
                "generator_lm_head": linear(WORDS, 8),
            }
        ),
        {"electra.embeddings.word_embeddings", "generator_lm_head"},
    ),
    "t5": (
        lambda: tree(
            {
                "shared": words(),
                "encoder.embed_tokens": words(),
                "encoder.block.0.layer.0.SelfAttention.q": linear(),
                "encoder.block.0.layer.0.SelfAttention.relative_attention_bias": nn.Embedding(
                    32, 2
                ),
                "decoder.embed_tokens": words(),
                "decoder.block.0.layer.1.EncDecAttention.k": linear(),
                "lm_head": nn.Linear(WIDTH, WORDS, bias=False),
            },
            (("shared", "encoder.embed_tokens"), ("shared", "decoder.embed_tokens")),
        ),
        {"shared", "lm_head"} | {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias"},
    ),
    "whisper": (
        lambda: tree(
            {
                "model.encoder.conv1": nn.Conv1d(8, WIDTH, 3),
                "model.encoder.embed_positions": places(),
                "model.encoder.layers.0.self_attn.k_proj": linear(),
                "model.decoder.embed_tokens": words(),
                "model.decoder.layers.0.encoder_attn.q_proj": linear(),
                "proj_out": nn.Linear(WIDTH, WORDS, bias=False),
            },
            (("model.decoder.embed_tokens", "proj_out"),),
        ),
        {"model.encoder.embed_positions", "model.decoder.embed_tokens", "+model.encoder.conv1"},
    ),
    "wav2vec2": (
        lambda: tree(
            {
                "wav2vec2.feature_projection.projection": linear(WIDTH, 8),
                "wav2vec2.encoder.pos_conv_embed.conv": weight_norm(
                    nn.Conv1d(WIDTH, WIDTH, 4, groups=2), dim=2
                ),
                "wav2vec2.encoder.layers.0.feed_forward.output_dense": linear(),
                "lm_head": linear(WORDS),
            }
        ),
        {
            "lm_head",
            "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original0",
            "+wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original1",
        },
    ),
    "mamba": (
        lambda: tree(mamba()),
        {"backbone.embeddings", "lm_head"}
        | {f"backbone.layers.0.mixer.{name}" for name in ("A_log", "conv1d", "dt_proj")},
    ),
    "diffusion transformer": (
        lambda: tree(adaptive()),
        {"y_embedder.embedding_table", "pos_embed", "proj_out"},
    ),
    "vit": (lambda: tree(image(head=linear(7))), {"cls_token", "pos_embed", "head"}),
    "deit, distilled": (
        lambda: tree(image(head=linear(7), head_dist=linear(7))),
        {"cls_token", "pos_embed", "head", "head_dist"},
    ),
    "swin": (
        lambda: tree(
            {
                "patch_embed.proj": nn.Conv2d(3, WIDTH, 4),
                "layers.0.blocks.0.attn.relative_position_bias_table": raw(169, 2),
                "layers.0.blocks.0.attn.qkv": linear(48),
                "layers.1.downsample.reduction": linear(24, 48),
                "head.fc": linear(7),
            }
        ),
        {"layers.0.blocks.0.attn.relative_position_bias_table", "head.fc"},
    ),
    "sam": (
        lambda: tree(
            {
                **image(),
                "blocks.0.attn.rel_pos_h": raw(27, 8),
                "blocks.0.attn.rel_pos_w": raw(27, 8),
                "neck.0": nn.Conv2d(WIDTH, 8, 1),
                "neck.2": nn.Conv2d(8, 8, 3),
            }
        ),
        {"cls_token", "pos_embed", "blocks.0.attn.rel_pos_h", "blocks.0.attn.rel_pos_w"},
    ),
    "perceiver": (
        lambda: tree(
            {
                "queries": raw(6, WIDTH),
                "positions": raw(PLACES, WIDTH),
                "encoder.pos_proj": linear(),
                "layers.0.cross_attn.to_q": linear(),
                "layers.0.cross_attn.to_kv": linear(2 * WIDTH),
                "to_logits": linear(7),
            }
        ),
        {"queries", "positions", "to_logits"},
    ),
    "convnext": (
        lambda: tree(
            {
                "stem.0": nn.Conv2d(3, 8, 4),
                "stages.0.blocks.0.conv_dw": nn.Conv2d(8, 8, 7, groups=8),
                "stages.0.blocks.0.mlp.fc1": nn.Conv2d(8, 32, 1),
                "head.fc": linear(7, 8),
            }
        ),
        {"stages.0.blocks.0.conv_dw", "head.fc"},
    ),
    "clip": (
        lambda: tree(
            {
                "text_model.embeddings.token_embedding": words(),
                "vision_model.embeddings.patch_embedding": nn.Conv2d(3, WIDTH, 8),
                "vision_model.encoder.layers.0.self_attn.k_proj": linear(),
                "visual_projection": linear(8),
                "text_projection": linear(8),
            }
        ),
        {"text_model.embeddings.token_embedding", "visual_projection", "text_projection"},
    ),
    "actor and critic": (
        lambda: tree({"trunk": linear(WIDTH, 8), "policy": linear(4), "value": linear(2)}),
        {"policy", "value"},
    ),
    "multilayer perceptron": (
        lambda: nn.Sequential(linear(24, 20), nn.ReLU(), linear(16, 24), nn.ReLU(), linear(10)),
        {"4"},
    ),
    "torch's encoder": (hub("token_"), {"token_table"}),
    "torch's encoder and decoder": (seq2seq, {"shared"}),
    "attention alone": (
        lambda: nn.MultiheadAttention(WIDTH, 2, add_bias_kv=True),
        {"bias_k", "bias_v"},
    ),
    "recurrent": (
        lambda: tree(
            {"encoder": words(), "rnn": nn.LSTM(WIDTH, INNER, 2), "decoder": linear(WORDS, INNER)}
        ),
        {"encoder", "decoder"},
    ),
    "a linear layer that is called a norm": (
        lambda: tree({"norm": linear(), "embedding.proj": linear(), "last": linear(3)}),
        {"last"},
    ),
    "first convolution of grey images": (
        lambda: tree(
            {
                "conv": nn.Conv2d(1, 8, 3),
                "up": nn.ConvTranspose2d(8, 8, 2, groups=8),
                "fc": linear(10, 8),
            }
        ),
        {"up", "fc"},
    ),
    "spectral norm": (
        lambda: tree({"hidden": spectral_norm(linear()), "final": linear(3)}),
        {"final"},
    ),
    "layers that share a weight": (
        lambda: tree(
            {"blocks.0.fc": linear(), "blocks.1.fc": linear(), "top": linear(3)},
            (("blocks.0.fc", "blocks.1.fc"),),
        ),
        {"top"},
    ),
    "a table without a module, tied": (lambda: table_of_its_own(), {"table"}),
}


def table_of_its_own() -> nn.Module:
    net = tree({"table": raw(WORDS, WIDTH), "mix": linear(), "out": linear(WORDS)})
    net.out.weight = net.table
    return net


def marked(net: nn.Module, **options: Any) -> set[str]:
    """What param_groups makes of parameters that are no vectors, as in the table."""
    found = set()
    shapes = 0
    for group in sk.optim.param_groups(net, verbose=False, **options):
        sign = "*" if group.get("batched") else "+" if group.get("matrix_dims") else ""
        for name, param in group["params"]:
            shapes += 1
            if param.ndim > 1 and (sign or group["algorithm"] == "adamw"):
                found.add(sign + name.removesuffix(".weight"))
            assert param.ndim > 1 or group["algorithm"] == "adamw"
    assert shapes == len(list(net.parameters()))
    return found


@pytest.mark.parametrize("name", TABLE)
def test_table_of_architectures(name):
    make, expected = TABLE[name]
    net = make()
    assert marked(net) == expected
    # Every optimizer takes them.
    for cls in (sk.optim.Muon, sk.optim.SOAP):
        cls(sk.optim.param_groups(net, verbose=False))


def test_names_alone_say_the_same_of_most_models():
    """Where they cannot, modules know more: what stands last, and what is a group of what."""
    missed = set()
    for name, (make, expected) in TABLE.items():
        net = make()
        members = [(n, p) for n, p in net.named_parameters() if p.ndim in (1, 2, 4)]
        optimizer = sk.optim.Muon(members)
        plain = {n.removesuffix(".weight") for n, p in members if p.ndim > 1}
        chosen = {n.removesuffix(".weight") for n, p in members if is_adamw(optimizer, p)} & plain
        missed |= {(name, each) for each in chosen ^ (expected & plain)}
    assert missed == {
        ("diffusion transformer", "proj_out"),
        ("diffusion transformer", "t_embedder.mlp.0"),
        ("diffusion transformer", "t_embedder.mlp.2"),
        ("grouped experts with biases", "model.layers.0.mlp.experts.b1"),
        ("recurrent", "encoder"),
        ("clip", "visual_projection"),
        ("clip", "text_projection"),
        ("actor and critic", "policy"),
        ("actor and critic", "value"),
        ("multilayer perceptron", "4"),
        ("torch's encoder", "token_table"),
        ("a linear layer that is called a norm", "norm"),
        ("a linear layer that is called a norm", "last"),
        ("first convolution of grey images", "fc"),
        ("first convolution of grey images", "up"),
        ("spectral norm", "final"),
        ("layers that share a weight", "top"),
        ("a table without a module, tied", "table"),
    }


def is_adamw(optimizer: Any, param: torch.Tensor) -> bool:
    return optimizer.algorithm_of(param) == "adamw"


# The packages themselves, where they are installed.

SMALL = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": INNER,
}
MOE = {"num_local_experts": 3, "num_key_value_heads": 2, "head_dim": 8}
PACKAGE: dict[str, tuple[dict[str, Any], set[str]]] = {
    "Llama": (SMALL, {"model.embed_tokens", "lm_head"}),
    "GptOss": (
        SMALL | MOE,
        {"model.embed_tokens", "lm_head"}
        | {f"*model.layers.0.mlp.experts.{name}_proj" for name in ("gate_up", "down")}
        | {f"model.layers.0.mlp.experts.{name}_proj_bias" for name in ("gate_up", "down")},
    ),
    "GPTNeoX": (SMALL, {"gpt_neox.embed_in", "lm_head"}),
    "Mamba": (
        {"vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": 1, "state_size": 4},
        {"backbone.embeddings"}
        | {f"backbone.layers.0.mixer.{name}" for name in ("A_log", "conv1d", "dt_proj")},
    ),
}


@pytest.mark.parametrize("name", PACKAGE)
def test_models_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    options, expected = PACKAGE[name]
    config = getattr(transformers, f"{name}Config")(**options)
    assert marked(getattr(transformers, f"{name}ForCausalLM")(config)) == expected


@pytest.mark.parametrize("tied", [True, False])
def test_masked_language_models_of_transformers(tied):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**SMALL, tie_word_embeddings=tied)
    expected = BERT if tied else BERT | {"cls.predictions.decoder"}
    assert marked(transformers.BertForMaskedLM(config)) == expected


def test_adapters_of_peft():
    transformers, peft = map(pytest.importorskip, ("transformers", "peft"))
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    names = {name for name, _ in net.named_parameters()}
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    wrapped = peft.get_peft_model(net, config)
    assert marked_names(wrapped) == {
        "model.layers.0.self_attn.q_proj.lora_A.default.weight": "matrix",
        "model.layers.0.self_attn.q_proj.lora_B.default.weight": "matrix",
        "lm_head.modules_to_save.default.weight": "adamw",
    }
    # Trained whole within the wrapper, a model has the names that it has without.
    wrapped.requires_grad_(True)
    assert names - {"lm_head.weight"} <= set(marked_names(wrapped))


def marked_names(net: nn.Module) -> dict[str, str]:
    return {
        name: group["algorithm"]
        for group in sk.optim.param_groups(net, verbose=False)
        for name, _ in group["params"]
    }
