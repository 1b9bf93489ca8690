"""A renderer of drawn faces: who they are, how they move, where they are.

Everything is a smooth function on the GPU or CPU: shapes are signed distances, blended with soft edges, so thousands
of frames a second come out of one jitted, vmapped call. A face is a vector of identity factors in [0, 1]; a frame
adds pose, expression and light; a clip moves them smoothly.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rfl_jax.models.layers import expand_to

# Factors that make a person, each uniform in [0, 1].
IDENTITY = (
    "face_width", "jaw", "face_height", "skin_tone", "skin_hue",
    "hair_tone", "hair_hue", "hair_length", "hair_volume", "fringe", "parting",
    "eye_spacing", "eye_size", "eye_height", "iris_hue", "iris_tone",
    "brow_thickness", "brow_tilt", "brow_height", "nose_length", "nose_width",
    "mouth_width", "lip_thickness", "lip_hue", "mouth_height", "beard", "glasses", "glasses_hue", "blush", "ears",
)  # fmt: skip

FPS = 12  # frames a second

# What moves from frame to frame, in units the drawing uses.
POSE = ("x", "y", "scale", "yaw", "pitch", "roll", "smile", "mouth_open", "blink", "brow_raise", "light", "cover")

BACKGROUNDS = ("grey", "blue", "green", "red", "yellow", "purple")
_BACKGROUND_RGB = (
    (0.55, 0.56, 0.58),
    (0.35, 0.5, 0.75),
    (0.4, 0.62, 0.42),
    (0.7, 0.4, 0.38),
    (0.78, 0.7, 0.42),
    (0.55, 0.42, 0.68),
)
MOTIONS = (
    "looks left and right", "nods", "tilts the head", "moves across the picture", "comes closer", "turns to the side",
)  # fmt: skip
EXPRESSIONS = ("smiles", "speaks", "blinks", "raises the eyebrows", "hides behind a hand")

# Prompts of held-out clips, as indices of background, motion and expression; no other clip has one of them.
_PROMPTS = tuple(itertools.product(*(range(len(choices)) for choices in (BACKGROUNDS, MOTIONS, EXPRESSIONS))))
HELD_OUT_PROMPTS = tuple(words for words in _PROMPTS if sum(words) % 4 == 3)
TRAINING_PROMPTS = tuple(words for words in _PROMPTS if sum(words) % 4 != 3)


@dataclasses.dataclass
class Scene:
    """All that is needed to draw b clips of t frames with up to q people, the first of whom is in front.

    Attributes:
        identity: factors in the order of `IDENTITY`; those of a person who stays the same do not depend on the frame.
        pose: factors of `POSE`.
        present: whether a person is in the clip.
        background: two RGB colours, top and bottom.
        words: index of background, motion and expression, for the prompt.
    """

    identity: Float[Array, "b q t i"]
    pose: Float[Array, "b q t p"]
    present: Bool[Array, "b q"]
    background: Float[Array, "b 2 3"]
    words: Int[Array, "b 3"]


jax.tree_util.register_dataclass(Scene, ["identity", "pose", "present", "background", "words"], [])


def prompt(words: Sequence[int]) -> str:
    """The caption of a clip."""
    background, motion, expression = words
    return f"A person {MOTIONS[motion]} and {EXPRESSIONS[expression]}, {BACKGROUNDS[background]} background."


def sample_identity(key: Array, count: int) -> Float[Array, "b i"]:
    """Random people."""
    return jax.random.uniform(key, (count, len(IDENTITY)))


def wander(key: Array, scene: Scene, strength: tuple[float, float]) -> Scene:
    """The scene with people who turn, evenly over the clip, into somebody nearer to the average person.

    Args:
        key: random.
        scene: with people who stay the same.
        strength: least and most of the way that they have gone by the last frame, a random part for each clip.
    """
    k1, k2 = jax.random.split(key)
    b, q, t, i = scene.identity.shape
    towards = jnp.clip(0.5 + 0.2 * jax.random.normal(k1, (b, q, 1, i)), 0, 1)
    gone = jax.random.uniform(k2, (b, 1, 1, 1), minval=strength[0], maxval=strength[1])
    time = (jnp.arange(t) / max(t - 1, 1))[None, None, :, None]
    return dataclasses.replace(scene, identity=scene.identity + gone * time * (towards - scene.identity))


def sample_scene(
    key: Array, identity: Float[Array, "b i"], frames: int, *,
    prompts: Sequence[tuple[int, ...]] = TRAINING_PROMPTS, company: float = 0.0,
) -> Scene:  # fmt: skip
    """Random clips of given people: one main motion and one expression each, everything else drifting slightly.

    Args:
        key: random.
        identity: one person a clip.
        frames: of each clip.
        prompts: what may happen in a clip.
        company: share of the clips in which a second, random person stands beside and a little behind the first.
    """
    k_words, k_first, k_second, k_who, k_company, k_side, k_shade = jax.random.split(key, 7)
    b = identity.shape[0]
    table = jnp.array(prompts)
    words = table[jax.random.randint(k_words, (b,), 0, len(prompts))]
    people, poses, present = [identity], [_poses(k_first, words, frames)], [jnp.ones(b, bool)]
    if company:
        together = jax.random.bernoulli(k_company, company, (b,))
        side = jnp.where(jax.random.bernoulli(k_side, 0.5, (b,)), 1.0, -1.0)[:, None]
        still = words.at[:, 1:].set(jnp.array([MOTIONS.index("nods"), EXPRESSIONS.index("blinks")])[None])
        people.append(sample_identity(k_who, b))
        poses.append(_aside(_poses(k_second, still, frames), side, 0.62))
        poses[0] = jnp.where(together[:, None, None], _aside(poses[0], -side, 0.75), poses[0])
        present.append(together)
    colour = jnp.array(_BACKGROUND_RGB)[words[:, 0]]
    shade = jax.random.uniform(k_shade, (b, 2, 1), minval=0.65, maxval=1.15)
    factors = jnp.stack(people, 1)[:, :, None]
    return Scene(
        jnp.broadcast_to(factors, (*factors.shape[:2], frames, factors.shape[-1])),
        jnp.stack(poses, 1),
        jnp.stack(present, 1),
        jnp.clip(colour[:, None] * shade, 0, 1),
        words,
    )


def _aside(pose: Float[Array, "b t p"], side: Float[Array, "b 1"], scale: float) -> Float[Array, "b t p"]:
    """The same movement, smaller and on one side of the picture."""
    x, size = POSE.index("x"), POSE.index("scale")
    pose = pose.at[..., x].set(0.4 * side + 0.4 * pose[..., x])
    return pose.at[..., size].multiply(scale / 1.2)


def _poses(key: Array, words: Int[Array, "b 3"], frames: int) -> Float[Array, "b t p"]:
    """What the prompt's motion and expression do to the factors of `POSE`, from random beginnings."""
    b = words.shape[0]
    keys = jax.random.split(key, 4)
    base = jnp.array([0.0, 0.02, 1.2, 0.0, 0.0, 0.0, 0.2, 0.05, 0.0, 0.0, 0.0, 0.0])
    spread = jnp.array([0.1, 0.07, 0.1, 0.25, 0.15, 0.08, 0.2, 0.05, 0.0, 0.1, 0.6, 0.0])
    drift = jnp.array([0.03, 0.03, 0.03, 0.08, 0.06, 0.03, 0.1, 0.03, 0.0, 0.05, 0.1, 0.0])
    start = base[None] + spread[None] * jax.random.uniform(keys[0], (b, len(POSE)), minval=-1.0)
    # A main motion and an expression, as amplitudes on the factors they move.
    motion = jnp.zeros((len(MOTIONS), len(POSE)))
    moved = (("yaw", 0.5), ("pitch", 0.4), ("roll", 0.22), ("x", 0.22), ("scale", 0.16), ("yaw", 1.0))
    for row, (factor, size) in enumerate(moved):
        motion = motion.at[row, POSE.index(factor)].set(size)
    expression = jnp.zeros((len(EXPRESSIONS), len(POSE)))
    changed = (("smile", 0.8), ("mouth_open", 0.9), ("blink", 1.0), ("brow_raise", 1.0), ("cover", 1.3))
    for row, (factor, size) in enumerate(changed):
        expression = expression.at[row, POSE.index(factor)].set(size)
    amplitude = motion[words[:, 1]] * jax.random.uniform(keys[1], (b, 1), minval=0.6)
    amplitude += expression[words[:, 2]] + drift[None]
    time = jnp.arange(frames)[None, :, None] / FPS
    rate = jax.random.uniform(keys[2], (b, 1, len(POSE)), minval=0.5, maxval=1.0)
    phase = jax.random.uniform(keys[3], (b, 1, len(POSE)), maxval=2 * jnp.pi)
    # A hand comes up after the first frame, which shows whom the video is about.
    phase = phase.at[..., POSE.index("cover")].set(-0.5)
    wave = jnp.sin(2 * jnp.pi * rate * time + phase)
    pose = start[:, None] + amplitude[:, None] * wave
    low = jnp.array([-0.3, -0.22, 0.95, -1.0, -0.6, -0.4, -0.3, 0.0, 0.0, -0.6, -1.0, 0.0])
    high = jnp.array([0.3, 0.22, 1.45, 1.0, 0.6, 0.4, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    return jnp.clip(pose, low[None, None], high[None, None])


def render(scene: Scene, size: int) -> Float[Array, "b t h w 3"]:
    """Frames in [-1, 1]."""
    draw = jax.vmap(jax.vmap(lambda i, p, n, c: _draw(i, p, n, c, size), (1, 1, None, None)), (0, 0, 0, 0))
    return draw(scene.identity, scene.pose, scene.present, scene.background) * 2 - 1


def landmarks(scene: Scene, size: int) -> tuple[Float[Array, "b q t 5 2"], Float[Array, "b q t 4"]]:
    """Pixel coordinates of eyes, nose tip and mouth corners, and the face's box x1, y1, x2, y2, of every person."""
    points = jax.vmap(jax.vmap(jax.vmap(_landmarks)))
    kps, box = points(scene.identity, scene.pose)
    scale = size / 2
    return (kps + 1) * scale - 0.5, (box + 1) * scale - 0.5


def visible(scene: Scene) -> Bool[Array, "b q t"]:
    """Whether a person's face is there to be found: not behind a hand."""
    return scene.present[:, :, None] & (scene.pose[..., POSE.index("cover")] < 0.5)


def _hue(h: Float[Array, ""], s: Float[Array, ""] | float, v: Float[Array, ""] | float) -> Float[Array, "3"]:
    """HSV to RGB, hue in turns."""
    k = (jnp.array([5.0, 3.0, 1.0]) + h * 6) % 6
    return v - v * s * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)


Factors = Mapping[str, Array]
Length = Float[Array, ""] | float
Colour = Float[Array, "3"]
Image = Float[Array, "h w 3"]


def _geometry(identity: Float[Array, " i"], pose: Float[Array, " p"]) -> tuple[Factors, Factors, Factors]:
    """Named factors, and where the features are in the face's own coordinates (head about 0.5 wide, 0.65 high)."""
    i: Factors = dict(zip(list[str](IDENTITY), identity, strict=True))
    p: Factors = dict(zip(list[str](POSE), pose, strict=True))
    yaw, pitch = p["yaw"], p["pitch"]
    turn = jnp.cos(yaw)
    spacing = 0.17 + 0.09 * i["eye_spacing"]
    eye_y = -0.06 - 0.08 * i["eye_height"] + 0.14 * pitch
    mouth_half = (0.11 + 0.1 * i["mouth_width"]) * (1 + 0.2 * p["smile"])
    mouth_y = 0.3 + 0.08 * i["mouth_height"] + 0.12 * pitch
    g = {
        "left_eye": jnp.stack([-spacing * turn + 0.22 * yaw, eye_y]),
        "right_eye": jnp.stack([spacing * turn + 0.22 * yaw, eye_y]),
        "nose": jnp.stack([0.34 * yaw, 0.06 + 0.11 * i["nose_length"] + 0.2 * pitch]),
        "left_mouth": jnp.stack([-mouth_half * turn + 0.25 * yaw, mouth_y - 0.05 * p["smile"]]),
        "right_mouth": jnp.stack([mouth_half * turn + 0.25 * yaw, mouth_y - 0.05 * p["smile"]]),
        "half_width": 0.36 + 0.1 * i["face_width"],
        "half_height": 0.5 + 0.09 * i["face_height"],
    }
    return i, p, g


def _to_image(point: Float[Array, "n 2"], p: Factors) -> Float[Array, "n 2"]:
    c, s = jnp.cos(p["roll"]), jnp.sin(p["roll"])
    x, y = point[..., 0], point[..., 1]
    return jnp.stack([p["x"] + p["scale"] * (c * x - s * y), p["y"] + p["scale"] * (s * x + c * y)], -1)


def _landmarks(identity: Float[Array, " i"], pose: Float[Array, " p"]) -> tuple[Float[Array, "5 2"], Float[Array, "4"]]:
    _, p, g = _geometry(identity, pose)
    kps = _to_image(jnp.stack([g[n] for n in ("left_eye", "right_eye", "nose", "left_mouth", "right_mouth")]), p)
    angle = jnp.linspace(0, 2 * jnp.pi, 24, endpoint=False)
    rim = jnp.stack([g["half_width"] * jnp.cos(angle), g["half_height"] * jnp.sin(angle)], -1)
    outline = _to_image(rim, p)
    return kps, jnp.concatenate([outline.min(0), outline.max(0)])


@dataclasses.dataclass(frozen=True)
class _Canvas:
    """A frame's pixels in the face's own coordinates, and how shapes are drawn on them.

    Attributes:
        u, v: position of every pixel, to the right and down.
        soft: width of a shape's edge.
    """

    u: Float[Array, "h w"]
    v: Float[Array, "h w"]
    soft: Float[Array, ""]

    def inside(self, distance: Float[Array, "h w"]) -> Float[Array, "h w"]:
        """How much of a pixel lies within a shape, from the signed distance to its rim."""
        return jax.nn.sigmoid(-distance / self.soft * 3.0)

    def ellipse(self, cx: Length, cy: Length, rx: Length, ry: Length, tilt: Length = 0.0) -> Float[Array, "h w"]:
        """Distance to the rim of an ellipse, to first order."""
        rx, ry = jnp.float32(rx), jnp.float32(ry)
        u, v = self.u - cx, self.v - cy
        ct, st = jnp.cos(tilt), jnp.sin(tilt)
        a, b = ct * u + st * v, -st * u + ct * v
        # The small term keeps the root's gradient finite at the centre.
        r = jnp.sqrt((a / rx) ** 2 + (b / ry) ** 2 + 1e-6)
        return r * (r - 1) / jnp.sqrt((a / rx**2) ** 2 + (b / ry**2) ** 2 + 1e-6)


def _paint(image: Image, colour: Float[Array, "#h #w 3"] | Colour, amount: Float[Array, "h w"]) -> Image:
    return image + (expand_to(colour, image) - image) * amount[..., None]


def _draw(
    identity: Float[Array, "q i"], pose: Float[Array, "q p"], present: Bool[Array, " q"], background: Float[Array, "2 3"],
    size: int,
) -> Image:  # fmt: skip
    """One frame, RGB in [0, 1], painted from the back to the front."""
    axis = (jnp.arange(size) + 0.5) * 2 / size - 1
    top, bottom = background[0][None, None], background[1][None, None]
    image = top + (bottom - top) * (axis[:, None, None] + 1) / 2 + jnp.zeros((size, size, 1))
    for i, p, there in reversed(list(zip(identity, pose, present, strict=True))):
        image = jnp.where(there, _draw_person(image, i, p, axis), image)
    return jnp.clip(image, 0, 1)


def _draw_person(
    image: Image, identity: Float[Array, " i"], pose: Float[Array, " p"], axis: Float[Array, " w"]
) -> Image:
    """A person over what is there already."""
    i, p, g = _geometry(identity, pose)
    x, y = axis[None, :], axis[:, None]
    c, s = jnp.cos(p["roll"]), jnp.sin(p["roll"])
    u = (c * (x - p["x"]) + s * (y - p["y"])) / p["scale"]
    v = (-s * (x - p["x"]) + c * (y - p["y"])) / p["scale"]
    canvas = _Canvas(u, v, 2.0 / axis.shape[0] / p["scale"])
    skin = _hue(
        0.045 + 0.035 * i["skin_hue"], 0.5 - 0.22 * i["skin_tone"] + 0.1 * i["skin_hue"], 0.42 + 0.55 * i["skin_tone"]
    )
    hair = _hue(
        0.02 + 0.11 * i["hair_hue"], 0.75 - 0.45 * i["hair_tone"] * i["hair_hue"], 0.08 + 0.8 * i["hair_tone"] ** 1.5
    )
    image = _shoulders(image, canvas, i, p, g, skin)
    image = _hair_behind(image, canvas, i, p, g, hair)
    image = _head(image, canvas, i, p, g, skin, hair)
    image = _eyes(image, canvas, i, p, g, hair)
    image = _nose(image, canvas, i, p, g, skin)
    image = _mouth(image, canvas, i, p, g)
    image = _hair_in_front(image, canvas, i, p, g, hair)
    image = _glasses(image, canvas, i, p, g)
    return _hand(image, canvas, p, skin)


def _shoulders(image: Image, canvas: _Canvas, i: Factors, p: Factors, g: Factors, skin: Colour) -> Image:
    """Shoulders and neck."""
    shirt = _hue(i["glasses_hue"] * 0.7 + 0.3 * i["lip_hue"], 0.45, 0.35 + 0.4 * i["hair_length"])
    image = _paint(image, shirt, canvas.inside(canvas.ellipse(0.0, 1.05, 0.68, 0.42)))
    neck = canvas.ellipse(0.05 * p["yaw"], 0.55, g["half_width"] * 0.5, 0.3)
    return _paint(image, skin * 0.82, canvas.inside(neck))


def _hair_volume(i: Factors) -> Array:
    return 0.04 + 0.12 * i["hair_volume"]


def _hair_behind(image: Image, canvas: _Canvas, i: Factors, p: Factors, g: Factors, hair: Colour) -> Image:
    """What of the hair lies behind the head: the longer, the further down."""
    w, h, volume, length = g["half_width"], g["half_height"], _hair_volume(i), 0.7 * i["hair_length"]
    back = canvas.ellipse(-0.05 * p["yaw"], -0.08 + 0.5 * length, w + volume, h * 0.85 + volume * 0.7 + 0.45 * length)
    return _paint(image, hair * 0.8, canvas.inside(back))


def _head(image: Image, canvas: _Canvas, i: Factors, p: Factors, g: Factors, skin: Colour, hair: Colour) -> Image:
    """Ears, a head with a jaw that is lit from one side, cheeks and beard."""
    u, v, yaw, pitch, w, h = canvas.u, canvas.v, p["yaw"], p["pitch"], g["half_width"], g["half_height"]
    ear = 0.05 + 0.05 * i["ears"]
    for side in (-1.0, 1.0):
        outline = canvas.ellipse(side * w * jnp.cos(yaw) - 0.1 * yaw, 0.05, ear, ear * 1.6)
        image = _paint(image, skin * 0.9, canvas.inside(outline))
    taper = 1 - (0.34 - 0.28 * i["jaw"]) * jnp.clip(v / h, 0, 1) ** 2
    head = canvas.inside((jnp.sqrt((u / (w * taper)) ** 2 + (v / h) ** 2 + 1e-6) - 1) * w)
    lit = 1 + 0.22 * p["light"] * jnp.clip(u / w, -1, 1) - 0.1 * jnp.clip(v / h, -1, 1) ** 2
    image = _paint(image, skin[None, None] * lit[..., None], head)
    for side in (-1.0, 1.0):
        cheek = jnp.exp(-(((u - side * 0.22 - 0.2 * yaw) / 0.1) ** 2 + ((v - 0.17 - 0.1 * pitch) / 0.08) ** 2))
        image = _paint(image, jnp.array([0.85, 0.35, 0.35]), 0.45 * i["blush"] * cheek * head)
    beard_edge = 0.24 - 0.1 * i["beard"]
    beard = jax.nn.sigmoid((i["beard"] - 0.6) * 30) * canvas.inside(beard_edge + 0.1 * pitch - v) * head
    return _paint(image, hair * 0.75, 0.85 * beard)


def _eyes(image: Image, canvas: _Canvas, i: Factors, p: Factors, g: Factors, hair: Colour) -> Image:
    """Eyes and brows."""
    iris = _hue(0.05 + 0.6 * i["iris_hue"], 0.65, 0.25 + 0.5 * i["iris_tone"])
    size = 0.062 + 0.042 * i["eye_size"]
    opening = jnp.clip(1 - p["blink"], 0.3, 1)
    for side, name in ((-1.0, "left_eye"), (1.0, "right_eye")):
        ex, ey = g[name]
        white = canvas.inside(canvas.ellipse(ex, ey, size * 1.35, size * 0.85 * opening))
        image = _paint(image, jnp.array([0.96, 0.96, 0.94]), white)
        gaze = ex + 0.03 * p["yaw"]
        for colour, radius in ((iris, size * 0.72), (jnp.array([0.04, 0.04, 0.05]), size * 0.34)):
            image = _paint(image, colour, white * canvas.inside(canvas.ellipse(gaze, ey, radius, radius)))
        brow_y = ey - 0.13 - 0.06 * i["brow_height"] - 0.05 * p["brow_raise"]
        tilt = side * (0.35 * i["brow_tilt"] - 0.12)
        brow = canvas.ellipse(ex, brow_y, size * 1.6, 0.014 + 0.035 * i["brow_thickness"], tilt)
        image = _paint(image, hair * 0.6, canvas.inside(brow))
    return image


def _nose(image: Image, canvas: _Canvas, i: Factors, p: Factors, g: Factors, skin: Colour) -> Image:
    """A shaded side and a tip."""
    nx, ny = g["nose"]
    width = 0.045 + 0.05 * i["nose_width"]
    bridge = canvas.ellipse(nx * 0.85 + 0.02 * jnp.sign(p["light"]), ny - 0.1, width * 0.45, 0.13)
    image = _paint(image, skin * 0.86, 0.6 * canvas.inside(bridge))
    return _paint(image, skin * 0.72, 0.9 * canvas.inside(canvas.ellipse(nx, ny, width, 0.042)))


def _mouth(image: Image, canvas: _Canvas, i: Factors, p: Factors, g: Factors) -> Image:
    """Lips along a curve that the smile bends, dark between them when open."""
    lips = _hue(0.97 + 0.04 * i["lip_hue"], 0.45 + 0.3 * i["lip_hue"], 0.55 + 0.35 * i["skin_tone"])
    lx, ly = g["left_mouth"]
    rx, ry = g["right_mouth"]
    mx, my, half = (lx + rx) / 2, (ly + ry) / 2, (rx - lx) / 2
    along = jnp.clip((canvas.u - mx) / half, -1, 1)
    curve = my + 0.05 * p["smile"] * (1 - along**2) * 1.6
    closed = (0.022 + 0.035 * i["lip_thickness"]) * jnp.sqrt(1.0001 - along**2)
    thickness = closed + 0.07 * p["mouth_open"] * (1 - along**2)
    opening = 0.085 * p["mouth_open"] * (1 - along**2) - 0.012
    height, ends = jnp.abs(canvas.v - curve), jnp.abs(canvas.u - mx) - half
    image = _paint(image, lips, canvas.inside(jnp.maximum(height - thickness, ends)))
    return _paint(image, jnp.array([0.2, 0.05, 0.06]), canvas.inside(jnp.maximum(height - opening, ends + 0.03)))


def _hair_in_front(image: Image, canvas: _Canvas, i: Factors, p: Factors, g: Factors, hair: Colour) -> Image:
    """A cap above a hairline that the fringe lowers and the parting shifts."""
    u, yaw, volume = canvas.u, p["yaw"], _hair_volume(i)
    parting = 0.14 * jnp.abs(u - 0.3 * (i["parting"] - 0.5) - 0.1 * yaw)
    hairline = -0.34 + 0.16 * i["fringe"] + 0.08 * p["pitch"] - parting
    cap = canvas.ellipse(0.0, -0.05, g["half_width"] + volume * 0.7, g["half_height"] + volume)
    return _paint(image, hair, canvas.inside(jnp.maximum(cap, (canvas.v - hairline) * 0.7)))


def _glasses(image: Image, canvas: _Canvas, i: Factors, p: Factors, g: Factors) -> Image:
    """A third of people wear them."""
    worn = jax.nn.sigmoid((i["glasses"] - 0.66) * 40)
    colour = _hue(i["glasses_hue"], 0.6, 0.25)
    for name in ("left_eye", "right_eye"):
        ex, ey = g[name]
        ring = jnp.abs(canvas.ellipse(ex, ey, 0.15, 0.125)) - 0.016
        image = _paint(image, colour, worn * canvas.inside(ring))
    bridge = jnp.maximum(jnp.abs(canvas.v - g["left_eye"][1]) - 0.014, jnp.abs(canvas.u - 0.22 * p["yaw"]) - 0.05)
    return _paint(image, colour, worn * canvas.inside(bridge))


def _hand(image: Image, canvas: _Canvas, p: Factors, skin: Colour) -> Image:
    """The back of a hand that comes up from below until it hides the face."""
    middle = 2.8 - 2.75 * p["cover"]
    inside = canvas.inside(
        jnp.maximum(jnp.abs(canvas.u) - 0.44 + 0.1 * (canvas.v - middle), jnp.abs(canvas.v - middle) - 0.5)
    )
    image = _paint(image, skin * 0.93, inside)
    for finger in (-0.22, 0.0, 0.22):
        gap = jnp.maximum(jnp.abs(canvas.u - finger) - 0.014, canvas.v - middle)
        image = _paint(image, skin * 0.62, inside * canvas.inside(gap))
    return image
