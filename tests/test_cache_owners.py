"""Files of shared caches: what they say, and what is refused before a model loads."""

import json

import pytest

from rkv_vllm.cache_owners import inline, owners_of_readers, write_owners


def owners(setting, *, model="models/Tiny-1B", num_layers=6):
    return owners_of_readers(str(setting), model, num_layers)


def test_a_file_says_which_layer_reads_which(tmp_path):
    path = tmp_path / "shared.json"
    write_owners(path, "Tiny-1B", 6, {4: 1, 3: 1, 5: 0})
    assert owners(path) == {3: 1, 4: 1, 5: 0}
    assert owners(path, model="/hub/models--Org--tiny-1b/snapshots/0abc") == {3: 1, 4: 1, 5: 0}
    assert [each.name for each in tmp_path.iterdir()] == ["shared.json"]
    assert owners("none") == {}


def test_a_file_is_carried_along_by_its_content(tmp_path):
    """A graph compiled for one file must not serve another one of that name."""
    path = tmp_path / "shared.json"
    write_owners(path, "Tiny-1B", 6, {4: 1})
    carried = inline(str(path))
    path.unlink()
    assert owners(carried) == {4: 1}
    assert inline(carried) == carried
    assert inline("none") == "none"


GOOD = {"model": "Tiny-1B", "num_layers": 6, "reads": {"4": 1}}


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        (None, "it cannot be read ([Errno 2]"),
        ("{", "it cannot be read (Expecting"),
        ([1], 'it is no object with "model", "num_layers" and "reads"'),
        ({**GOOD, "model": 3}, '"model" is no text'),
        ({**GOOD, "reads": [[4, 1]]}, '"reads" no object'),
        ({**GOOD, "reads": {}}, "no layer reads another one's cache"),
        ({**GOOD, "reads": {"four": 1}}, "\"reads\" has 'four': 1, not two layer numbers"),
        ({**GOOD, "reads": {"4": "1"}}, "\"reads\" has '4': '1', not two layer numbers"),
        ({**GOOD, "reads": {"4": 1, "04": 2}}, '"reads" names a layer twice'),
        ({**GOOD, "model": "Other-7B"}, "but it is for 'Other-7B'"),
        ({**GOOD, "num_layers": 8}, "it is for 8 layers, and the model has 6"),
        ({**GOOD, "reads": {"1": 4}}, "layer 1 reads layer 4, not one before it of layers 0 to 5"),
        ({**GOOD, "reads": {"4": 4}}, "layer 4 reads layer 4, not one before it"),
        ({**GOOD, "reads": {"6": 1}}, "layer 6 reads layer 1, not one before it"),
        ({**GOOD, "reads": {"4": -1}}, "layer 4 reads layer -1, not one before it"),
        ({**GOOD, "reads": {"4": 1, "5": 4}}, "layer 5 reads layer 4, which itself reads 1"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_the_command(tmp_path, document, sentence):
    path = tmp_path / "shared.json"
    if document is not None:
        path.write_text(document if isinstance(document, str) else json.dumps(document))
    with pytest.raises(ValueError, match=r"--kv-share-layers \(share_layers\): got ") as error:
        owners(path)
    assert sentence in str(error.value)
    assert "rkv-vllm calibrate models/Tiny-1B --share-layers FILE.json" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
