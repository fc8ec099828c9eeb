"""Each architecture is scored as its own forward pass does, and published as it was stored."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdar.algorithms.logprobs import TokenScorer
from sdar.algorithms.scorer_check import measure_scorer_error, require_exact_scorer
from sdar.config import TrainingConfig
from sdar.contracts.errors import ConfigurationError, CorruptionError
from sdar.model.causal_lm import (
    compute_version_shapes,
    export_tensors,
    install_tensors,
    load_causal_lm,
)
from services.learner.model import _prepare_for_training

from .architectures import ARCHITECTURES, VOCABULARY, make_model

LENGTHS = (13, 9, 6, 2)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request):
    return make_model(request.param)


@pytest.fixture
def stored(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path


def draw_tokens():
    """Token ids, right-padded with 0, and the tokens to score: some of each sequence."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=generator)
    positions = torch.arange(max(LENGTHS))
    is_token = positions < torch.tensor(LENGTHS).unsqueeze(-1)
    return ids.masked_fill(~is_token, 0), is_token & (positions % 4 != 0)


def score_alone(model, ids, mask, temperature):
    """Log-probs under the model's own forward pass, each sequence alone and without padding."""
    scores = []
    for row, length in enumerate(LENGTHS):
        logits = model(input_ids=ids[row : row + 1, :length]).logits[0] / temperature
        logprobs = logits.log_softmax(-1)
        scores += [logprobs[t - 1, ids[row, t]] for t in range(1, length) if mask[row, t]]
    return torch.stack(scores)


def read_files(directory):
    tensors = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def copies(tensors):
    return {name: value.clone() for name, value in tensors.items()}


def assert_equal(left, right):
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_and_gradients_are_those_of_the_own_forward_pass(model, temperature):
    ids, mask = draw_tokens()
    results = []
    for score in (
        lambda: TokenScorer(model, temperature=temperature, chunk_size=5)(ids, mask)[0],
        lambda: score_alone(model, ids, mask, temperature),
    ):
        model.zero_grad()
        logprobs = score()
        # Weighted, or the gradients of a whole distribution would cancel out.
        (logprobs * torch.linspace(0.5, 2, len(logprobs))).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((logprobs.detach(), copies(gradients)))
    (ours, our_gradients), (own, own_gradients) = results
    torch.testing.assert_close(ours, own, atol=1e-5, rtol=0)
    assert our_gradients.keys() == own_gradients.keys()
    for name, gradient in own_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("chunk_size", [1, 100])
def test_the_size_of_a_chunk_changes_no_score(model, chunk_size):
    ids, mask = draw_tokens()
    with torch.no_grad():
        expected, _ = TokenScorer(model, temperature=0.7, chunk_size=5)(ids, mask)
        scores, _ = TokenScorer(model, temperature=0.7, chunk_size=chunk_size)(ids, mask)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


def test_nothing_to_score_still_reaches_the_head(model):
    model.zero_grad()
    logprobs, entropy = TokenScorer(model, temperature=1.0, chunk_size=5)(
        torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, dtype=torch.bool), 9
    )
    (logprobs.sum() + entropy.sum()).backward()
    gradient = model.get_output_embeddings().weight.grad
    assert logprobs.shape == (0,)
    assert gradient is not None
    assert not gradient.any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_check_passes_each_of_them_as_it_is_trained(stored, dtype):
    training = TrainingConfig(gradient_checkpointing=True)
    model = _prepare_for_training(load_causal_lm(stored, dtype), training)
    require_exact_scorer(model)
    assert model.training
    # Where the same shapes give the same bits, what is left are the scorer's chunks.
    assert measure_scorer_error(model).largest < 1e-4


def test_a_version_has_the_names_and_values_of_the_checkpoint(stored, model):
    files = read_files(stored)
    loaded = load_causal_lm(stored, "float32")
    exported = export_tensors(loaded)
    assert_equal(exported, files)
    assert_equal(export_tensors(model), files)
    shapes = {name: tuple(value.shape) for name, value in files.items()}
    assert compute_version_shapes(stored) == shapes
    # As a checkpoint of the learner is written.
    save_file(exported, stored / "again.safetensors")


def test_a_version_that_is_installed_is_exported_to_the_bit(stored):
    loaded = load_causal_lm(stored, "bfloat16")
    first, before = copies(export_tensors(loaded)), copies(loaded.state_dict())
    second = {name: torch.randn_like(value) for name, value in first.items()}
    install_tensors(loaded, second.items())
    assert_equal(export_tensors(loaded), second)
    install_tensors(loaded, first.items())
    assert_equal(loaded.state_dict(), before)


def test_a_version_of_another_model_leaves_the_weights_alone(stored):
    loaded = load_causal_lm(stored, "float32")
    before, tensors = copies(loaded.state_dict()), copies(export_tensors(loaded))
    name = max(tensors)
    changed = {key: value + 1 for key, value in tensors.items()}
    with pytest.raises(CorruptionError, match="missing"):
        install_tensors(loaded, ((key, changed[key]) for key in changed if key != name))
    with pytest.raises(CorruptionError, match="has shape"):
        install_tensors(loaded, (changed | {name: tensors[name][None]}).items())
    assert_equal(loaded.state_dict(), before)


def test_experts_are_published_one_by_one(tmp_path):
    make_model("mixtral").save_pretrained(tmp_path)
    names = export_tensors(load_causal_lm(tmp_path, "float32"))
    assert names["model.layers.0.block_sparse_moe.experts.3.w1.weight"].shape == (24, 16)
    assert not [name for name in names if "gate_up_proj" in name]


def test_a_checkpoint_already_in_the_form_of_the_model_keeps_its_names(tmp_path):
    make_model("mixtral").save_pretrained(tmp_path, save_original_format=False)
    exported = export_tensors(load_causal_lm(tmp_path, "float32"))
    assert "model.layers.0.mlp.experts.gate_up_proj" in exported
    assert_equal(exported, read_files(tmp_path))
    shapes = {name: tuple(value.shape) for name, value in exported.items()}
    assert compute_version_shapes(tmp_path) == shapes


def test_more_than_ten_experts_keep_their_order(tmp_path):
    make_model("qwen3_moe", num_experts=12).save_pretrained(tmp_path)
    loaded = load_causal_lm(tmp_path, "float32")
    install_tensors(loaded, read_files(tmp_path).items())
    assert_equal(export_tensors(loaded), read_files(tmp_path))


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path):
    make_model("qwen2").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"lack 1 tensors.*layers\.1\.mlp\.up_proj"):
        load_causal_lm(tmp_path, "float32")


def test_an_untied_head_under_a_configuration_that_ties_it_is_refused(tmp_path):
    make_model("qwen2", tie_word_embeddings=False).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text()) | {"tie_word_embeddings": True}
    file.write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match=r"ties lm_head\.weight .* another tensor"):
        load_causal_lm(tmp_path, "float32")


def test_a_tied_head_that_the_files_repeat_is_published_once(tmp_path):
    make_model("qwen2").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, {"format": "pt"})
    exported = export_tensors(load_causal_lm(tmp_path, "float32"))
    assert "lm_head.weight" not in exported
    assert compute_version_shapes(tmp_path).keys() == exported.keys()


def test_the_check_finds_a_scale_that_the_scorer_misses():
    model = make_model("granite")
    exact = measure_scorer_error(model)
    assert exact.is_exact
    # Granite divides its logits by 8. A scorer that called the head alone would not: the head gets
    # one row of hidden states from the scorer, and the whole batch in the model's own forward pass.
    model.lm_head.register_forward_hook(
        lambda _, inputs, logits: logits if inputs[0].shape[0] > 1 else 8 * logits
    )
    with pytest.raises(ConfigurationError, match=r"differ by up to .* nats .* rounding explains"):
        require_exact_scorer(model)


def test_the_check_finds_dropout_that_was_left_on():
    model = make_model("starcoder2").train()
    assert not measure_scorer_error(model).is_exact
    assert model.training


def test_the_check_finds_a_model_that_sees_what_comes_after():
    with pytest.raises(ConfigurationError, match="BertLMHeadModel: log-probs of random tokens"):
        require_exact_scorer(make_bert())


def test_the_check_finds_weights_that_are_not_numbers():
    model = make_model("qwen2")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ConfigurationError, match="differ by up to nan nats"):
        require_exact_scorer(model)


def test_a_model_that_calls_a_layer_of_its_body_is_refused():
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    with pytest.raises(ConfigurationError, match="OPTForCausalLM cannot be scored a chunk"):
        require_exact_scorer(OPTForCausalLM(config).eval())


def test_the_check_leaves_the_random_state_alone():
    model = make_model("qwen2")
    state = torch.random.get_rng_state()
    require_exact_scorer(model)
    assert torch.equal(state, torch.random.get_rng_state())


def make_bert():
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    return BertLMHeadModel(config).eval()
