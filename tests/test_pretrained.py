"""Pretrained models: parity with transformers, GGUF against Hugging Face's files, and everything that can be wrong with a file."""

import dataclasses
import json
import math
import re
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.model import chat, generate, gpt, pretrained, shapes, tokenizer
from kvcascade.model.pretrained import Model

GOLDEN = np.load(Path(__file__).with_name("golden_logits.npz"))  # made by make_golden.py
TOKENS = jnp.asarray(tiny_models.PROMPTS, jnp.int32)
ARCHITECTURES = list(tiny_models.CONFIGS)
forward, step = (jax.jit(each, static_argnums=0) for each in (gpt.forward, gpt.step))


def decoded(model: Model, spec: str, chunk: int = 1):
    """Logits of every position, `chunk` tokens at a time through a cache."""
    B, T = TOKENS.shape
    cache = generate.empty_cache(model.config, parse(spec), B, T)
    found = []
    for start in range(0, T, chunk):
        positions = jnp.broadcast_to(jnp.arange(start, start + chunk), (B, chunk))
        logits, cache = step(model.config, model.params, cache, TOKENS[:, start : start + chunk], positions)
        found.append(logits)
    return jnp.concatenate(found, 1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_equal_transformers(name, tmp_path):
    """Without a cache, token by token, and in chunks: a tolerance of 1e-4 on logits of up to 7."""
    model = pretrained.load(str(tiny_models.write(name, tmp_path / name)))
    assert pretrained.shape(str(tmp_path / name)) == model.config
    for logits in (
        forward(model.config, model.params, TOKENS),
        decoded(model, "full@f32"),
        decoded(model, "full@f32", 8),
    ):
        np.testing.assert_allclose(logits[:, tiny_models.POSITIONS], GOLDEN[name], atol=1e-4)


@pytest.mark.parametrize("name", ["smollm3", "phi4", "longrope"])
def test_caches_of_unlike_layers_change_nothing_while_nothing_leaves_them(name, tmp_path):
    model = pretrained.load(str(tiny_models.write(name, tmp_path)))
    logits = decoded(model, "layers[0:1]: full@f32 ; layers[1:]: sink 2@f32 | recent 2@f32 | heavy 20@f32")
    np.testing.assert_allclose(logits[:, tiny_models.POSITIONS], GOLDEN[name], atol=1e-4)
    assert np.isfinite(decoded(model, "layers[0:1]: full ; layers[1:]: sink 2 | recent 4 | heavy 4@int8/int4")).all()


def write_gguf(name: str, file: Path, quantised: bool = False, **changes) -> Path:
    """The same model as llama.cpp's converter writes it; `changes` replace metadata, None removes a tensor."""
    config = tiny_models.CONFIGS[name]
    arch = {"mistral": "llama", "mixtral": "llama", "gemma3_text": "gemma3", "qwen3_moe": "qwen3moe"}.get(
        config["model_type"], config["model_type"]
    )
    writer = gguf.GGUFWriter(file, changes.get("architecture", arch))
    writer.add_block_count(config.get("num_hidden_layers", tiny_models.LAYERS))
    writer.add_context_length(64)
    writer.add_embedding_length(tiny_models.WIDTH)
    writer.add_head_count(tiny_models.HEADS)
    writer.add_feed_forward_length(4 * tiny_models.WIDTH if name == "gpt2" else tiny_models.MLP)
    if name == "gpt2":
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_head_count_kv(tiny_models.KV_HEADS)
        said = config.get("rope_parameters", config)
        writer.add_rope_freq_base(said["rope_theta"])
        if said.get("rope_type") == "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(said["factor"])
            writer.add_rope_scaling_orig_ctx_len(said["original_max_position_embeddings"])
        if name == "phi4":
            writer.add_rope_dimension_count(6)
        if name == "phi4" or said.get("rope_type") == "longrope":
            original = said["original_max_position_embeddings"]
            writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
            writer.add_rope_scaling_orig_ctx_len(original)
            writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(64 / original) / math.log(original)))
    if experts := config.get("num_experts", config.get("num_local_experts")):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if name in ("gemma2", "gemma3"):
        writer.add_attention_scale(config["query_pre_attn_scalar"] ** -0.5)
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if name == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if name == "gemma3":
        writer.add_sliding_window_pattern(config["sliding_window_pattern"])
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config["rope_scaling"]["factor"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, "he", "<|end|>"]
    writer.add_tokenizer_model(changes.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    tokens = changes.get("tokens", names)
    writer.add_token_list(tokens)
    writer.add_token_types(changes.get("kinds", [gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL]))
    if "scores" in changes:
        writer.add_token_scores(changes["scores"])
    writer.add_token_merges(changes.get("merges", ["h e"]))
    changes.get("extra", lambda writer: None)(writer)
    if "template" in changes:
        writer.add_chat_template(changes["template"])
        writer.add_bos_token_id(names.index("<|end|>"))
        writer.add_eos_token_id(names.index("he"))
    for tensor, array in gguf_tensors(name).items():
        if changes.get("without") == tensor:
            continue
        if quantised and array.ndim == 2 and array.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(tensor, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def gguf_tensors(name: str) -> dict[str, np.ndarray]:
    """Weights under GGUF's names; llama's queries and keys with the halves of each head interleaved."""
    shared = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    shared |= {"transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm"}
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down", "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up",
        "mlp.gate": "ffn_gate_inp", "block_sparse_moe.gate": "ffn_gate_inp",
    }  # fmt: skip
    gemma = name.startswith("gemma")
    if gemma:
        parts |= {
            "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        }  # fmt: skip
    found, stacked = {}, {}
    for tensor, array in tiny_models.weights(name).items():
        owner, leaf = tensor.rsplit(".", 1)
        array = array + 1 if gemma and owner.endswith("norm") else array
        if owner in shared:
            found[f"{shared[owner]}.{leaf}"] = array
            continue
        layer, part = owner.removeprefix("model.layers.").removeprefix("transformer.h.").split(".", 1)
        if expert := re.fullmatch(r".*experts\.(\d+)\.(\w+)", part):
            kind = {"w1": "gate", "w2": "down", "w3": "up"}.get(expert[2], expert[2].removesuffix("_proj"))
            stacked.setdefault(f"blk.{layer}.ffn_{kind}_exps.weight", []).append(array)
            continue
        if part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj") and leaf == "weight":
            array = array.T
        if tiny_models.CONFIGS[name]["model_type"] in ("llama", "mistral", "mixtral", "smollm3") and parts[part] in (
            "attn_q",
            "attn_k",
        ):
            heads = array.reshape(-1, 2, tiny_models.WIDTH // tiny_models.HEADS // 2, array.shape[-1])
            array = heads.swapaxes(1, 2).reshape(array.shape)
        found[f"blk.{layer}.{parts[part]}.{leaf}"] = array
    found |= {tensor: np.stack(arrays) for tensor, arrays in stacked.items()}
    if name == "llama3":
        config = shapes.from_hub(tiny_models.CONFIGS[name], name)
        found["rope_freqs.weight"] = np.asarray(config.rope_factors, np.float32)
    if name.startswith("longrope") or name == "phi4":
        said = tiny_models.CONFIGS[name].get("rope_scaling", tiny_models.LONGROPE)
        for length in ("long", "short"):
            found[f"rope_factors_{length}.weight"] = np.asarray(said[f"{length}_factor"], np.float32)
    return found


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if "gpt2_" not in name and "_raw" not in name])
def test_gguf_equals_the_directory(name, tmp_path):
    """Layouts, names and shapes of both kinds of file lead to the same parameters, bit for bit, and the same configuration."""
    ours = pretrained.load(f"gguf:{write_gguf(name, tmp_path / 'model.gguf')}")
    theirs = pretrained.load(str(tiny_models.write(name, tmp_path / name)))
    assert pretrained.shape(f"gguf:{tmp_path / 'model.gguf'}") == ours.config
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    same = dict.fromkeys(("rope_factors", "norm_eps", "head_width", "rope_scale", "unlike"))
    assert dataclasses.replace(ours.config, **{key: getattr(theirs.config, key) for key in same}) == theirs.config
    np.testing.assert_allclose(ours.config.rope_factors, theirs.config.rope_factors, rtol=1e-6)
    np.testing.assert_allclose(ours.config.rope_scale, theirs.config.rope_scale, rtol=1e-6)


def test_quantised_gguf(tmp_path):
    """Eight-bit blocks are dequantised: close to the original weights, and not equal."""
    exact = pretrained.load(f"gguf:{write_gguf('llama', tmp_path / 'f32.gguf')}").params
    eight = pretrained.load(f"gguf:{write_gguf('llama', tmp_path / 'q8.gguf', quantised=True)}").params
    error = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), exact, eight)
    assert 0 < max(jax.tree.leaves(error)) < 0.01


def test_shards_are_put_together(tmp_path):
    whole = pretrained.load(str(tiny_models.write("llama", tmp_path / "whole")))
    parts = pretrained.load(str(tiny_models.write("llama", tmp_path / "parts", shards=3)))
    jax.tree.map(np.testing.assert_array_equal, whole.params, parts.params)


def test_progress_counts_every_tensor(tmp_path):
    seen = []
    pretrained.load(str(tiny_models.write("qwen2", tmp_path / "m")), lambda done, of: seen.append((done, of)))
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))]
    assert len(seen) == len(tiny_models.weights("qwen2"))


def refuse(name: str | Path, *words: str) -> None:
    with pytest.raises(BadInput) as caught:
        pretrained.load(str(name))
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_damaged_files_are_refused_in_one_line(tmp_path):
    file = write_gguf("llama", tmp_path / "m.gguf")
    content = file.read_bytes()
    for length in (0, 3, 40, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        refuse(f"gguf:{file}", "m.gguf", "damaged")
    length = (
        content.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8
    )  # behind two numbers that say what follows
    file.write_bytes(
        content[: length - 4] + bytes(4) + (2**40).to_bytes(8, "little") + content[length + 8 :]
    )  # so many bytes
    refuse(f"gguf:{file}", "m.gguf", "damaged")
    file.write_bytes(b"GGML" + content[4:])
    refuse(f"gguf:{file}", "not a GGUF file")
    refuse(f"gguf:{tmp_path / 'none.gguf'}", "none.gguf", "No such file")
    folder = tiny_models.write("llama", tmp_path / "m")
    (folder / "config.json").write_text(json.dumps(tiny_models.CONFIGS["llama"] | {"num_hidden_layers": 9000}))
    refuse(folder, "9,000 layers", "20 tensors")
    tiny_models.write("llama", folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refuse(folder, "model.safetensors", "damaged")
    (folder / "model.safetensors").unlink()
    refuse(folder, "lacks model.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001.safetensors"}}')
    refuse(folder, "lacks model-00001.safetensors")
    for index, *words in (
        ('{"metadata": {}}', "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": ["a"]}', "weight_map must be a table", "['a']"),
        ('{"weight_map": {"a": null}}', "lacks weight_map.a"),
        ('{"weight_map": {"a": 3}}', "weight_map.a must be a text, not 3"),
        ('{"weight_map": {"a": "../secret"}}', "weight_map", "'../secret'"),
        ("null", "must be a table"),
        ("[1]", "must be a table"),
        ("{", "cannot read"),
    ):
        (folder / "model.safetensors.index.json").write_text(index)
        refuse(folder, "model.safetensors.index.json", *words)
    (folder / "tokenizer.json").write_text("{}")
    refuse(folder, "tokenizer.json", "damaged")
    (folder / "tokenizer.json").unlink()
    refuse(folder, "lacks tokenizer.json")
    (folder / "config.json").write_text("{")
    refuse(folder, "config.json")


def test_wrong_models_are_refused_in_one_line(tmp_path):
    refuse(f"gguf:{write_gguf('llama', tmp_path / 'a.gguf', architecture='gemma')}", "'gemma'", "llama, qwen2")
    refuse(
        f"gguf:{write_gguf('llama', tmp_path / 'b.gguf', without='blk.1.attn_v.weight')}", "lacks blk.1.attn_v.weight"
    )
    refuse(f"gguf:{write_gguf('llama', tmp_path / 'c.gguf', tokenizer='t5')}", "t5/smollm")
    refuse(f"gguf:{write_gguf('llama', tmp_path / 'c.gguf', tokenizer='llama')}", "lacks tokenizer.ggml.scores")
    many = [f"t{i}" for i in range(300)]
    refuse(f"gguf:{write_gguf('llama', tmp_path / 'd.gguf', tokens=many)}", "tokenizer.ggml.merges[0]", "'h e'")
    folder = tiny_models.write("llama", tmp_path / "m", shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refuse(folder, "lacks model-00002-of-00002.safetensors")
    for changes, *words in (
        ({"model_type": "gemma"}, "'gemma'", "llama, mistral"),
        ({"hidden_act": "relu"}, "the activation relu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is dynamic", "llama3"),
        ({"intermediate_size": 50}, "has the shape"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2"),
        ({"num_hidden_layers": 1}, "has unexpected model.layers.1"),
        ({"num_hidden_layers": None}, "config.json lacks num_hidden_layers"),
        ({"vocab_size": 100}, "has tokens up to 256, but the model only 100 rows"),
    ):
        folder = tiny_models.write("llama", tmp_path / "w")
        (folder / "config.json").write_text(json.dumps(tiny_models.CONFIGS["llama"] | changes))
        refuse(folder, *words)


def test_what_is_a_name_of_a_pretrained_model(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"model": {}}')
    assert pretrained.is_pretrained(str(tiny_models.write("llama", tmp_path / "m")))
    assert pretrained.is_pretrained("gguf:x") and pretrained.is_pretrained("HuggingFaceTB/SmolLM2-135M")
    assert not pretrained.is_pretrained(str(tmp_path / "run"))
    assert not pretrained.is_pretrained(str(tmp_path / "missing"))


def smollm_reference(ranks: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """SmolLM's tokenizer.json: digits one by one, then GPT-2's pattern."""
    reference = Tokenizer(models.BPE(vocab=ranks, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    reference.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    reference.decoder = decoders.ByteLevel()
    return reference


TEXT = "The  12 cats' tails; they'll   see 3½ of ²them.\n\n\tdef f(x1):\n    return  x1 + 10  \u00a0 2\u3000三 3\r\n"
MERGES = [
    ("Ġ", "t"),
    ("Ġ", "Ġ"),
    ("h", "e"),
    ("Ġt", "he"),
    ("ĠĠ", "ĠĠ"),
    ("Â", "½"),
    ("Ġ", "1"),
    ("Ċ", "Ċ"),
    ("'", "l"),
    ("'l", "l"),
]


@given(st.text(alphabet=st.sampled_from(TEXT + "abcZ09 '\u0661\U0001f600é"), max_size=40) | st.text(max_size=30))
def test_gguf_tokens_equal_tokenizers_and_come_back(text):
    """Of any text the same tokens as the `tokenizers` library makes, and the text again."""
    names = sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in MERGES]
    fields = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": [*names, "<|end|>"],
        "tokenizer.ggml.token_type": [gguf.TokenType.NORMAL] * len(names) + [gguf.TokenType.CONTROL],
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in MERGES],
    }  # fmt: skip
    ours = tokenizer.from_gguf(fields, "x.gguf")
    reference = smollm_reference({name: rank for rank, name in enumerate(names)}, MERGES)
    for each in (text, TEXT + text):
        tokens = ours.encode(each, disallowed_special=())
        assert tokens == reference.encode(each).ids
        assert ours.decode(tokens) == each
        np.testing.assert_array_equal(ours.encode_to_numpy(each, disallowed_special=()), tokens)


def test_bytes_that_a_vocabulary_lacks_are_left_out():
    names = [name for name in sorted(pre_tokenizers.ByteLevel.alphabet()) if name != "ñ"]  # the byte 0xF1
    fields = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": [gguf.TokenType.NORMAL] * 255, "tokenizer.ggml.merges": [],
    }  # fmt: skip
    ours = tokenizer.from_gguf(fields, "x.gguf")
    reference = smollm_reference({name: rank for rank, name in enumerate(names)}, [])
    text = "a\U00040000b"
    assert ours.n_vocab == 255
    assert ours.encode(text, disallowed_special=()) == reference.encode(text).ids
    assert list(ours.encode_to_numpy(text, disallowed_special=())) == reference.encode(text).ids
    assert tokenizer.token_bytes(ours).tolist() == [1] * 255


def test_text_does_not_become_special_tokens_by_accident(tmp_path):
    model = pretrained.load(str(tiny_models.write("llama", tmp_path / "m")))
    encoding = model.encoding
    assert isinstance(encoding, tokenizer.HubTokenizer)
    assert len(encoding.encode("<|end|>")) == 7
    assert encoding.encode("<|end|>", allowed_special="all") == [256]
    assert b"".join(map(encoding.decode_single_token_bytes, encoding.encode("né\n"))) == "né\n".encode()
    assert tokenizer.token_bytes(encoding).tolist() == [1] * 256 + [0]


CHAT = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"


@pytest.mark.parametrize("bos", ["<|end|>", {"content": "<|end|>", "lstrip": False}], ids=["text", "with more"])
def test_a_chat_begins_and_ends_with_the_tokens_of_the_directory(tmp_path, bos):
    """`bos_token` and `eos_token` of tokenizer_config.json, as text or with more about them; without them nothing is written."""
    messages = [{"role": "user", "content": "hi"}]
    folder = tiny_models.write("llama", tmp_path)
    settings = {"chat_template": CHAT, "bos_token": bos, "eos_token": "x"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    model = pretrained.load(str(folder))
    encoded = chat.encode(model, messages)
    assert encoded[0] == 256 and encoded[1:] == list(model.encoding.encode("hix"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT, "bos_token": None}))
    assert chat.encode(pretrained.load(str(folder)), messages) == encoded[1:-1]


def test_a_chat_begins_and_ends_with_the_tokens_of_a_gguf(tmp_path):
    """Their numbers are in its metadata; a template gets their texts."""
    model = pretrained.load(f"gguf:{write_gguf('llama', tmp_path / 'm.gguf', template=CHAT)}")
    encoded = chat.encode(model, [{"role": "user", "content": "hi"}])
    assert model.special == {"bos_token": "<|end|>", "eos_token": "he"}
    assert encoded[0] == 257 and encoded[1:] == list(model.encoding.encode("hihe"))
