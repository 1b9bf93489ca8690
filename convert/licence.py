"""Whose the weights of a face network or of a CLIP are, and what their publisher lets one do with them.

By content where it is a published file's, which the SHA-256 tells under any name; else by the names of file and folder. A
file that two publishers give under different terms stands under the stricter.
"""

import re
from pathlib import Path

from etils import epath

from convert import store
from rfl_jax.fingerprint import content_of

UNKNOWN = "unknown licence, ask its publisher"
# The terms by the publishers' own words: insightface's README.md and python-package/README.md, "License"; the model card
# of fal/AuraFace-v1 on the Hugging Face hub; our NOTICE.
_INSIGHTFACE = "non-commercial research only (insightface's README)"
_FAL = "Apache-2.0, meant for commercial use too (fal's model card)"
_OURS = "Apache-2.0 (NOTICE)"

_PREDICTOR = "the aesthetic predictor's head: Apache-2.0 (christophschuhmann/improved-aesthetic-predictor's LICENSE)"

_BY_CONTENT = {
    "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0": _PREDICTOR,
    "4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169e1048f9fef534cdf": f"antelopev2's embedder: {_INSIGHTFACE}",
    "4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43": (
        f"buffalo_l's and buffalo_m's embedder: {_INSIGHTFACE}"
    ),
    "9cc6e4a75f0e2bf0b1aed94578f144d15175f357bdc05e815e5c4a02b319eb4f": (
        f"buffalo_s' and buffalo_sc's embedder: {_INSIGHTFACE}"
    ),
    "5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91": (
        f"antelopev2's and buffalo_l's detector: {_INSIGHTFACE}; AuraFace-v1 has the same file, as Apache-2.0"
    ),
    "041f73f47371333d1d17a6fee6c8ab4e6aecabefe398ff32cca4e2d5eaee0af9": f"buffalo_m's detector: {_INSIGHTFACE}",
    "5e4447f50245bbd7966bd6c0fa52938c61474a04ec7def48753668a9d8b4ea3a": (
        f"buffalo_s' and buffalo_sc's detector: {_INSIGHTFACE}"
    ),
    "a7933ea5330113b01c9b60351d8f4c33003f145d8470ac5f0e52ee2effe25c60": f"AuraFace-v1's embedder: {_FAL}",
    "d0d8e3e44c33fc5e9881d19dfcad0f00da6410f4e8dbf5f561176320b5ee2bbb": f"the miniature's detector: {_OURS}",
    "d5ef568d315707063f3e6c9e4d4599da7bec63df2928e97872d927548f8fd74c": f"the miniature's embedder: {_OURS}",
    "31f53727a0ede48fcef5c10d840d3a457098744a08731f6c1a953d9a31f6b1b7": f"the miniature's judging embedder: {_OURS}",
}
# Names that insightface alone gives.
_BY_NAME = re.compile(r"(w600k_(r50|mbf)|det_(500m|2\.5g|10g)|scrfd_(500m|2\.5g|10g|34g)_(bn|gn)?kps.*)\.onnx")
# What two publishers call alike, by the nearest folder with a name that tells.
_SHARED = "glintr100.onnx"
_BY_FOLDER = {
    r"antelope": f"antelopev2's embedder by its folder's name: {_INSIGHTFACE}",
    r"auraface": f"AuraFace-v1's embedder by its folder's name: {_FAL}",
}
# Of CLIPs, in the name of the file or of the nearest folder that has any of these: the hub's folders have the publisher's too.
_BY_PART = {
    r"sac\+logos\+ava1-l14-linearMSE": _PREDICTOR,
    r"HPS_v2|HPSv2": "HPS v2 by its name: Apache-2.0 (its model card)",
    r"PickScore": "PickScore by its name: its code is MIT, its model card names no licence of the weights, ask its publisher",
    r"CLIP-ViT-H-14-laion2B": "LAION's CLIP by its name: MIT (its model card, which calls deployment out of scope)",
    r"openai.*clip-vit|^clip-vit-large-patch14|^ViT-L-14\.": (
        "OpenAI's CLIP by its name: MIT (openai/CLIP's LICENSE; its model card calls deployment out of scope)"
    ),
}


def licence_of(weights: str) -> str:
    """One line on the weights of a face network or of a CLIP: whose they are and their licence; `UNKNOWN` where nothing tells.

    Args:
        weights: a file, a folder with one, or the folder of what was converted, which remembers its source's.

    Raises:
        UserError: they cannot be read.
    """
    if store.is_converted(weights):
        return store.read_description(weights)["origin"].get("licence", UNKNOWN)
    if epath.Path(weights).is_dir():
        return _by_name(Path(weights))
    digest = content_of(epath.Path(weights)).removeprefix("sha256:")
    return _BY_CONTENT.get(digest) or _by_name(Path(weights))


def _by_name(file: Path) -> str:
    if _BY_NAME.fullmatch(file.name):
        return f"insightface's {file.name} by its name: {_INSIGHTFACE}"
    if file.name == _SHARED:
        for folder in file.absolute().parents:
            for pattern, line in _BY_FOLDER.items():
                if re.search(pattern, folder.name, re.IGNORECASE):
                    return line
    for part in (file.absolute(), *file.absolute().parents):
        for pattern, line in _BY_PART.items():
            if re.search(pattern, part.name):
                return line
    return UNKNOWN
