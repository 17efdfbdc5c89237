"""Published weights: older names, files of one's own, and what is told when they cannot be had or do not fit."""

import hashlib
import http.client
import re
import urllib.error

import pytest
import torch

from lit_parallel.errors import UserError
from lit_parallel.networks import DenseNet, densenet_weights
from lit_parallel.networks.densenet_weights import PUBLISHED, load_published

LAYER = "features.denseblock2.denselayer1"


def network(growth_rate=4, block_config=(1, 2), num_init_features=8, num_classes=5, **options) -> DenseNet:
    return DenseNet(growth_rate, block_config, num_init_features, num_classes=num_classes, **options)


def weights() -> dict[str, torch.Tensor]:
    """A state dict in which no two values are alike."""
    return {
        name: torch.rand_like(value) if value.is_floating_point() else value + 9
        for name, value in network().state_dict().items()
    }


def older(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the names of the published files, which count no batches."""
    return {
        re.sub(r"(denselayer\d+)\.(norm|conv)([12])", r"\1.\2.\3", name): value
        for name, value in state.items()
        if not name.endswith("num_batches_tracked")
    }


def assert_loaded(model, state, but="num_batches_tracked"):
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], value) for name, value in state.items() if not (but and name.endswith(but)))


def refusal(model, source) -> str:
    """The line that a refusal tells; the network must be as before."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_published(model, source)
    assert_loaded(model, before, but=None)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def saved(tmp_path):
    def save(content, **options):
        torch.save(content, tmp_path / "weights.pth", **options)
        return tmp_path / "weights.pth"

    return save


# -- a file -----------------------------------------------------------------------------------------------------------


def test_a_state_dict_of_todays_names(saved):
    model, state = network(), weights()
    load_published(model, saved(state))
    assert_loaded(model, state, but=None)


def test_older_names():
    names = older(weights())
    assert f"{LAYER}.norm.1.running_var" in names
    assert f"{LAYER}.conv.2.weight" in names
    assert not any("norm1" in name or "conv2" in name for name in names)


@pytest.mark.parametrize("rename", [dict, older])
@pytest.mark.parametrize("prefix", ["", "module.", "network.", "model._orig_mod."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_names_prefixes_and_wrappers(rename, prefix, wrapped, saved):
    model, state = network(), weights()
    content = {prefix + name: value for name, value in rename(state).items()}
    load_published(model, str(saved({"state_dict": content, "epoch": 3} if wrapped else content)))
    assert_loaded(model, state)


def test_the_file_format_of_the_published_files(saved):
    model, state = network(), weights()
    load_published(model, saved(older(state), _use_new_zipfile_serialization=False))
    assert_loaded(model, state)


def test_type_and_memory_format_of_the_network_stay(saved):
    model = network().bfloat16().to(memory_format=torch.channels_last)
    state = weights()
    load_published(model, saved(state))
    assert_loaded(model, {name: value.to(model.state_dict()[name].dtype) for name, value in state.items()})
    convolution = model.get_submodule(LAYER).conv2.weight
    assert convolution.dtype == torch.bfloat16
    assert convolution.is_contiguous(memory_format=torch.channels_last)


# -- what does not fit ------------------------------------------------------------------------------------------------


def test_other_classes_are_refused_with_what_to_do(saved):
    path = saved(weights())
    message = refusal(network(num_classes=3), path)
    assert f"'{path}'" in message
    assert "they know 5 classes and the network 3" in message
    assert "num_classes=5 (model.num_classes=5); to train it on other classes, replace its `classifier`" in message


def test_another_network_is_refused_by_its_first_parameter(saved):
    path = saved(weights())
    assert refusal(network(num_init_features=6), path).endswith(
        "do not fit the network: 'features.conv0.weight' has the shape [8, 3, 7, 7], and the network's is [6, 3, 7, 7]."
    )
    deeper = refusal(network(block_config=(2, 2)), path)
    assert deeper.endswith("'features.denseblock1.denselayer2.norm1.weight' is missing.")
    assert refusal(network(block_config=(1, 1)), path).endswith(
        "'features.norm5.weight' has the shape [14], and the network's is [10]."
    )


def test_a_missing_parameter_is_named(saved):
    state = older(weights())
    del state[f"{LAYER}.norm.2.running_mean"]
    assert refusal(network(), saved(state)).endswith(f"'{LAYER}.norm2.running_mean' is missing.")


def test_a_surplus_parameter_is_named(saved):
    message = refusal(network(), saved({**weights(), "a.weight": torch.zeros(2, 3), "b": torch.zeros(1)}))
    assert message.endswith("'a.weight' (one of 2 such names) of shape [2, 3] has no place in it.")


def test_another_kind_of_network_is_told_by_its_names(saved):
    assert refusal(network(), saved({"conv1.weight": torch.zeros(3)})).endswith(
        "'features.conv0.weight' is missing; the names begin with 'conv1.weight'."
    )
    assert refusal(network(), saved({})).endswith("'features.conv0.weight' is missing.")


@pytest.mark.parametrize("content", [[1], torch.zeros(3), {0: torch.zeros(3)}], ids=lambda x: type(x).__name__)
def test_what_is_no_state_dict_is_refused(content, saved):
    assert f"of type {type(content).__name__}" in refusal(network(), saved(content))


def test_what_is_no_tensor_is_refused(saved):
    assert "'classifier.bias' is not a tensor" in refusal(network(), saved({**weights(), "classifier.bias": 3.0}))


def test_values_that_are_not_finite_are_refused(saved):
    state = weights()
    state[f"{LAYER}.norm2.running_var"][1] = float("nan")
    assert f"first in '{LAYER}.norm2.running_var'" in refusal(network(), saved(state))


# -- a file that cannot be read ---------------------------------------------------------------------------------------


def test_a_missing_file_and_an_unknown_name(tmp_path):
    assert f"There is no file '{tmp_path}'" in refusal(network(), tmp_path)
    message = refusal(network(), "densnet201")
    assert "There is no file 'densnet201', nor are weights published" in message
    assert message.endswith("Did you mean 'densenet201'?")


def test_a_damaged_file(saved):
    path = saved(weights())
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert f"Cannot use the weights '{path}'" in refusal(network(), path)
    for damaged in (b"", b"\x80\x02garbage", b"<html>not found</html>"):
        path.write_bytes(damaged)
        assert f"Cannot use the weights '{path}'" in refusal(network(), path)


class Harmful:
    def __reduce__(self):
        return pytest.fail, ("code in the file was executed",)


def test_nothing_in_a_file_is_executed(saved):
    assert "nothing in it was executed" in refusal(network(), saved({**weights(), "a": Harmful()}))


# -- the published files ----------------------------------------------------------------------------------------------


def test_where_the_published_files_are():
    assert PUBLISHED == {
        "densenet121": "https://download.pytorch.org/models/densenet121-a639ec97.pth",
        "densenet161": "https://download.pytorch.org/models/densenet161-8d451a50.pth",
        "densenet169": "https://download.pytorch.org/models/densenet169-b2777c0a.pth",
        "densenet201": "https://download.pytorch.org/models/densenet201-c1103571.pth",
    }
    assert {name: build.__name__ for name, build in densenet_weights._BUILDERS.items()} == {
        name: name for name in PUBLISHED
    }


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where torch.hub keeps files; "densenet121" is a small network meanwhile."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setitem(densenet_weights._BUILDERS, "densenet121", network)
    return tmp_path / "home" / "hub" / "checkpoints"


@pytest.fixture
def publish(cache, tmp_path, monkeypatch):
    """Publish a state dict as the file of densenet121, under the hash that it has or the one given."""

    def publish(state, digest=None):
        path = tmp_path / "published.pth"
        torch.save(state, path, _use_new_zipfile_serialization=False)
        digest = digest or hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        path = path.rename(tmp_path / f"densenet121-{digest}.pth")
        monkeypatch.setitem(PUBLISHED, "densenet121", path.as_uri())
        return path

    return publish


def test_published_weights_are_fetched_once(publish, cache):
    model, state = network(), weights()
    path = publish(older(state))
    load_published(model, "densenet121")
    assert_loaded(model, state)
    assert [file.name for file in cache.iterdir()] == [path.name]
    path.unlink()
    again = network()
    load_published(again, "densenet121")
    assert_loaded(again, state)


def by_hand(message: str) -> str:
    """What stands before the way out, which every failure tells."""
    way_out = f"fetch {PUBLISHED['densenet121']} by hand, and set model.weights=PATH to that file"
    assert f"{way_out} instead of model.pretrained=true." in message
    return message.partition(way_out)[0]


def test_a_wrong_hash_leaves_nothing_behind(publish, cache):
    publish(older(weights()), "0badc0de")
    assert 'invalid hash value (expected "0badc0de"' in by_hand(refusal(network(), "densenet121"))
    assert list(cache.iterdir()) == []


def test_a_file_that_is_not_there(publish, cache):
    publish(older(weights())).unlink()
    assert "Cannot get the weights of densenet121, <urlopen error" in by_hand(refusal(network(), "densenet121"))
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (urllib.error.URLError("Name or service\nnot known"), "Name or service not known"),
        (urllib.error.HTTPError("https://a", 503, "Service Unavailable", None, None), "503: Service Unavailable"),
        (http.client.IncompleteRead(b"abc", 7), "IncompleteRead"),
        (TimeoutError(), "TimeoutError"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
    ids=lambda x: type(x).__name__,
)
@pytest.mark.usefixtures("cache")
def test_offline_and_servers_that_fail(error, words, monkeypatch):
    asked = []

    def fail(url, **options):
        asked.append((url, options))
        raise error

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    assert words in by_hand(refusal(network(), "densenet121"))
    assert asked == [(PUBLISHED["densenet121"], {"map_location": "cpu", "check_hash": True, "weights_only": True})]


def test_a_damaged_file_in_the_cache(publish, cache):
    path = publish(older(weights()))
    load_published(network(), "densenet121")
    kept = cache / path.name
    kept.write_bytes(kept.read_bytes()[:100])
    assert by_hand(refusal(network(), "densenet121")).endswith(
        f"'{kept}' is damaged or cannot be read: delete it and try again, or "
    )


@pytest.mark.usefixtures("cache")
def test_nothing_is_fetched_that_will_not_fit(monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("it was fetched"))
    assert "The weights densenet121 do not fit the network: they know 5 classes and the network 10" in refusal(
        network(num_classes=10), "densenet121"
    )
    assert "'features.conv0.weight' has the shape" in refusal(network(small_images=True), "densenet121")
