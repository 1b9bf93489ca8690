"""Every listed clip encoded once and cached; what cannot be used is refused or left out by its row."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence

import jax
from etils import epath
from tqdm import tqdm

from rfl_jax import hosts
from rfl_jax.data.cache import PreparedClip, write_arrays
from rfl_jax.data.encoding import ClipEncoder
from rfl_jax.data.metadata import Clip
from rfl_jax.data.sizes import clip_settings
from rfl_jax.data.videos import read_clip
from rfl_jax.errors import UserError
from rfl_jax.fingerprint import fingerprint
from rfl_jax.networks.faces import detector_file, embedder_file
from rfl_jax.networks.terms import term_keys

FORMAT = 2  # of the cached files; a new number makes old ones unused


@dataclasses.dataclass(frozen=True)
class Clips:
    """The prepared clips of a run.

    Attributes:
        training: to train on.
        held_out: for validation and evaluation; empty without them.
    """

    training: list[PreparedClip]
    held_out: list[PreparedClip]


def prepare_clips(
    encoder: ClipEncoder, clips: Sequence[Clip], cache: epath.Path, *, listed_in: str, real: Sequence[str] = ()
) -> list[PreparedClip]:
    """Encodes clips, taking from the cache what is there.

    Args:
        encoder: of the run; nothing is opened if all clips are cached.
        clips: rows of a csv.
        cache: folder of prepared clips.
        listed_in: the csv, for messages.
        real: arrays of `ClipEncoder.encode_real` that each clip has as well.

    Raises:
        UserError: an unusable row under `data.on_bad_row=error`, or none that is usable.
    """
    strict = encoder.cfg.data.on_bad_row == "error"
    settings, terms = _settings(encoder), term_keys(encoder.cfg)
    cache.mkdir(parents=True, exist_ok=True)
    # Every process takes its part of the rows.
    part, parts = jax.process_index(), jax.process_count()
    found: dict[int, str] = {}
    errors: dict[int, str] = {}
    for clip in tqdm(clips[part::parts], desc="prepare", disable=None):
        try:
            found[clip.number] = _prepare(encoder, clip, cache, settings, real, terms)
        except UserError as error:
            errors[clip.number] = str(error)
            if strict:
                break
    for of_process in hosts.exchange({"found": found, "errors": errors}):
        found |= {int(number): name for number, name in of_process["found"].items()}
        errors |= {int(number): text for number, text in of_process["errors"].items()}
    bad = sorted(errors)
    if bad and strict:
        raise UserError(f"{listed_in}: row {bad[0]}: {errors[bad[0]]}")
    for number in bad if hosts.is_writer() else []:
        tqdm.write(f"{listed_in}: row {number} left out: {errors[number]}")
    prepared = [PreparedClip(clip, cache / found[clip.number]) for clip in clips if clip.number in found]
    if not prepared:
        raise UserError(f"{listed_in}: none of its {len(clips)} rows can be used")
    if bad and hosts.is_writer():
        print(f"{len(bad)} of {len(clips)} rows left out: {', '.join(map(str, bad))}")
    return prepared


def _prepare(
    encoder: ClipEncoder,
    clip: Clip,
    cache: epath.Path,
    settings: str,
    real: Sequence[str],
    terms: Mapping[str, str],
) -> str:
    """The name of a clip's file. It is written if it is not there, and so are those beside it: with the arrays of `real`, of
    each term of the reward, and of its people.
    """
    prepared = PreparedClip(clip, cache / f"{_clip_hash(settings, clip)}.npz")
    missing = not prepared.file.exists()
    missing_real = bool(real) and not prepared.real_file(real).exists()
    missing_terms = {name: key for name, key in terms.items() if not prepared.term_file(key).exists()}
    missing_people = bool(encoder.cfg.people_arrays) and not prepared.people_file.exists()
    if not any((missing, missing_real, missing_terms, missing_people)):
        return prepared.file.name
    video = read_clip(clip.video, **clip_settings(encoder.cfg))
    if missing:
        arrays = encoder.encode(video, clip.prompt)
        if not arrays.pop("found")[0]:
            raise UserError(f"{clip.video}: no face in the first frame")
        write_arrays(prepared.file, arrays)
    if missing_real:
        write_arrays(prepared.real_file(real), encoder.encode_real(video, real))
    if missing_people:
        write_arrays(prepared.people_file, encoder.encode_people(video))
    if missing_terms:
        arrays = encoder.encode_terms(video, clip.prompt, prepared.load(("pool",)))
        for name, key in missing_terms.items():
            write_arrays(prepared.term_file(key), arrays[name])
    return prepared.file.name


def _settings(encoder: ClipEncoder) -> str:
    """Everything besides the row itself that a prepared clip depends on."""
    cfg, sources = encoder.cfg, encoder.sources
    faces = [detector_file(sources.reward), embedder_file(sources.reward)]
    if encoder.judge:
        faces.append(embedder_file(encoder.judge))
    settings = {
        "format": FORMAT,
        "clip": clip_settings(cfg),
        "inputs": cfg.extra_inputs,
        "preset": cfg.preset,
        "dtype": cfg.dtype,
        "reward": [cfg.reward.compat, cfg.reward.channel_order, cfg.reward.detector_size],
        "weights": [fingerprint(f) for f in (*sources.text_encoder, *sources.vae, sources.tokenizer)],
        "faces": [fingerprint(file) for file in faces],
    }
    return json.dumps(settings, sort_keys=True)


def _clip_hash(settings: str, clip: Clip) -> str:
    digest = hashlib.sha256(settings.encode())
    digest.update(clip.prompt.encode())
    try:
        with clip.video.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError:
        raise UserError(f"{clip.video}: no such video") from None
    return digest.hexdigest()[:32]
