"""Hugging Face folders, made here at random from configurations: no hub, no network."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
tf = pytest.importorskip("transformers")

from featherweight.convert import to_onnx  # noqa: E402
from featherweight.errors import ModelError  # noqa: E402
from featherweight.graph import io  # noqa: E402
from featherweight.graph.normalise import normalise  # noqa: E402
from featherweight.graph.weights import weights  # noqa: E402
from featherweight.runtime import ort  # noqa: E402

SIZES = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 32,
}  # fmt: skip
NO_IDS = {"bos_token_id": 1, "eos_token_id": 2}


def saved(path: Path, model) -> Path:
    torch.manual_seed(0)
    for name, p in model.named_parameters():  # no two equal tensors, no unit norms
        if p.dim() == 1:
            torch.nn.init.normal_(p, 1.0 if "weight" in name else 0.0, 0.2)
    model.save_pretrained(path)
    return path


def bert(kind="BertForSequenceClassification", **options):
    return getattr(tf, kind)(tf.BertConfig(**SIZES, **options))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    return saved(tmp_path_factory.mktemp("hf") / "bert", bert(num_labels=3))


def shape(value: ir.Value) -> list[str]:
    return [str(d) for d in value.shape]


def test_a_classifier(classifier, tmp_path):
    from featherweight.graph.channels import analyse

    found = to_onnx(classifier, tmp_path / "m.onnx")
    assert found.largest_difference < 1e-5
    assert [set(s) for s in found.sizes] == [{"batch", "sequence"}] * 2
    assert found.sizes[0] != found.sizes[1]
    model = io.load(found.path)
    assert [v.name for v in model.graph.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
    assert {tuple(shape(v)) for v in model.graph.inputs} == {("batch", "sequence")}
    assert [(v.name, shape(v)) for v in model.graph.outputs] == [("logits", ["batch", "3"])]
    stored = set(model.graph.initializers)
    assert {"bert.encoder.layer.0.attention.self.query.weight", "classifier.weight", "classifier.bias"} <= stored
    assert not any(name.startswith("model.") for name in stored)
    plain = normalise(model, run=None).model
    sites = {w.name for w in weights(plain)}
    assert {"bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.output.dense.weight"} <= sites
    units = sorted(len(g.units) for g in analyse(plain).groups)
    assert units == [2, 16, 32], "the heads, the pooler, the hidden units"

    source = tf.AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    ids, mask = torch.randint(3, 60, (4, 9)), torch.ones(4, 9, dtype=torch.long)
    mask[0, 4:] = 0
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        expected = source(**feeds).logits.numpy()
    out = ort.session(found.path).run({k: v.numpy() for k, v in feeds.items()})["logits"]
    assert np.allclose(out, expected, atol=1e-5)


def decoders():
    llama = tf.LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=True)
    gpt2 = tf.GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2, n_positions=32, **NO_IDS)
    return {"llama": tf.LlamaForCausalLM(llama), "gpt2": tf.GPT2LMHeadModel(gpt2)}


@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_small_decoder_keeps_its_table_tied(name, tmp_path):
    found = to_onnx(saved(tmp_path / name, decoders()[name]), tmp_path / "m.onnx")
    model = io.load(found.path)
    assert [v.name for v in model.graph.inputs] == ["input_ids", "attention_mask"]
    assert [(v.name, shape(v)) for v in model.graph.outputs] == [("logits", ["batch", "sequence", "60"])]
    tables = [k for k, v in model.graph.initializers.items() if sorted(v.const_value.shape.numpy()) == [16, 60]]
    assert tables == ["transformer.wte.weight" if name == "gpt2" else "model.embed_tokens.weight"]


def others():
    small = {"vocab_size": 60, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 32}
    image = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return {
        "distilbert": lambda: tf.DistilBertForSequenceClassification(tf.DistilBertConfig(**small)),
        "roberta": lambda: tf.RobertaForTokenClassification(tf.RobertaConfig(**SIZES)),
        "electra": lambda: tf.ElectraForQuestionAnswering(tf.ElectraConfig(**SIZES, embedding_size=16)),
        "encoder": lambda: bert("BertModel"),
        "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**image, image_size=16, patch_size=8)),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("distilbert", ["logits"]), ("roberta", ["logits"]), ("electra", ["start_logits", "end_logits"]),
        ("encoder", ["last_hidden_state", "pooler_output"]), ("vit", ["logits"]),
    ],
)  # fmt: skip
def test_other_kinds(name, outputs, tmp_path):
    found = to_onnx(saved(tmp_path / name, others()[name]()), tmp_path / "m.onnx")
    assert [v.name for v in io.load(found.path).graph.outputs] == outputs
    assert found.largest_difference < 1e-4


def sentence_folder(path: Path, modules: list[dict], pooling: dict) -> Path:
    model = bert("BertModel")
    saved(path, model)
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (path / "modules.json").write_text(
        json.dumps([{"path": "", "type": "sentence_transformers.models.Transformer"}, *modules])
    )
    return path


POOLING = {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}


def test_a_sentence_encoder(tmp_path):
    kinds = [POOLING, {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}]
    path = sentence_folder(tmp_path / "s", kinds, {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False})
    (path / "tokenizer.json").write_text("{}")
    found = to_onnx(path, tmp_path / "m.onnx")
    assert found.tokenizer == (path / "tokenizer.json").resolve()
    model = io.load(found.path)
    assert [(v.name, shape(v)) for v in model.graph.outputs] == [("sentence_embedding", ["batch", "16"])]
    assert "encoder.layer.0.attention.self.query.weight" in model.graph.initializers
    ids, mask = torch.randint(3, 60, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = 0
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        states = tf.AutoModel.from_pretrained(path).eval()(**feeds).last_hidden_state
    rows = [states[i, mask[i] == 1].mean(0) for i in range(3)]
    expected = torch.stack([r / r.norm() for r in rows]).numpy()
    out = ort.session(found.path).run({k: v.numpy() for k, v in feeds.items()})["sentence_embedding"]
    assert np.allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("modules", "pooling", "says"),
    [
        ([POOLING, {"path": "2", "type": "x.WordWeights"}], {"pooling_mode_mean_tokens": True}, "'WordWeights'"),
        ([POOLING], {"pooling_mode_weightedmean_tokens": True}, "weightedmean_tokens"),
        ([POOLING], {}, "pools by nothing"),
    ],
)
def test_unknown_sentence_modules(modules, pooling, says, tmp_path):
    with pytest.raises(ModelError, match=says):
        to_onnx(sentence_folder(tmp_path / "s", modules, pooling), tmp_path / "m.onnx")


@pytest.mark.parametrize("way", ["cls_token", "max_tokens", "mean_sqrt_len_tokens", "lasttoken"])
def test_ways_of_pooling(way):
    from featherweight.convert.sentence import _pool

    states = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])[..., None].float()
    rows = [states[0, :3], states[1, :1]]
    expected = {
        "cls_token": [r[0] for r in rows], "max_tokens": [r.amax(0) for r in rows],
        "mean_sqrt_len_tokens": [r.sum(0) / len(r) ** 0.5 for r in rows], "lasttoken": [r[-1] for r in rows],
    }[way]  # fmt: skip
    assert torch.allclose(_pool(way, states, mask), torch.stack(expected), atol=1e-6)


def test_a_lacking_head_is_not_made_up(classifier, tmp_path):
    path = saved(tmp_path / "base", bert("BertModel"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "architectures": ["BertForSequenceClassification"]}))
    with pytest.raises(ModelError, match=r"lacks the weight 'classifier.bias' and 1 more.*would be random"):
        to_onnx(path, tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architectures": ["OwnNetwork"]}, "'OwnNetwork', which transformers"),
        ({"architectures": ["is_torch_available"]}, "'is_torch_available', which transformers"),
        ({"model_type": "no-such"}, "cannot be read by transformers"),
        ({"": 0, "architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "encoder and a decoder"),
        ({"hidden_size": 32}, "cannot be read|contradict"),
    ],
)
def test_folders_that_do_not_fit(change, says, classifier, tmp_path):
    path = tmp_path / "f"
    path.mkdir()
    for file in classifier.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(change if "" in change else {**config, **change}))
    with pytest.raises(ModelError, match=says):
        to_onnx(path, tmp_path / "m.onnx")
