"""The world of shapes: scenes, three ways to draw them, and what every patch of a picture holds.

A scene is a background and up to three shapes, listed left to right (by the middle of their bounding
box). Lengths are pixels of the drawn picture, angles are radians, y points down. Nothing overlaps.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

RGB = tuple[int, int, int]
Floats = npt.NDArray[np.float32]

KINDS = ("circle", "square", "triangle", "star", "cross")
COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "white")
BACKGROUNDS = ("white", "black", "gray", "red", "green", "blue", "yellow", "orange", "purple", "pink")

# What drawing programs and their palettes mean by a colour's name; a scene jitters these slightly.
SHADES: dict[str, tuple[RGB, ...]] = {
    "red": ((255, 0, 0), (220, 38, 38), (200, 0, 0), (231, 60, 50), (220, 20, 60), (178, 20, 20)),
    "green": (
        (0, 128, 0),
        (0, 255, 0),
        (34, 139, 34),
        (46, 204, 113),
        (22, 163, 74),
        (0, 180, 0),
        (0, 100, 0),
    ),
    "blue": ((0, 0, 255), (30, 100, 240), (37, 99, 235), (52, 130, 219), (0, 0, 170), (30, 144, 255)),
    "yellow": ((255, 255, 0), (255, 220, 0), (250, 210, 30), (241, 205, 20), (255, 240, 60)),
    "orange": ((255, 165, 0), (255, 140, 0), (249, 115, 22), (240, 130, 30), (255, 120, 0), (243, 150, 18)),
    "purple": ((128, 0, 128), (148, 0, 211), (155, 89, 182), (147, 51, 234), (160, 32, 240), (100, 30, 150)),
    "black": ((0, 0, 0), (10, 10, 10), (25, 25, 25), (35, 35, 35)),
    "white": ((255, 255, 255), (250, 250, 250), (245, 245, 245), (240, 240, 240)),
}
GROUNDS: dict[str, tuple[RGB, ...]] = {
    "white": ((255, 255, 255), (255, 255, 255), (250, 250, 250), (245, 245, 245), (240, 240, 240)),
    "black": ((0, 0, 0), (0, 0, 0), (12, 12, 12), (20, 20, 20), (30, 30, 30)),
    "gray": (
        (128, 128, 128),
        (160, 160, 160),
        (192, 192, 192),
        (100, 100, 100),
        (80, 80, 85),
        (205, 205, 205),
    ),
    "red": ((255, 0, 0), (200, 20, 20), (139, 0, 0), (90, 10, 15), (230, 50, 50)),
    "green": ((0, 128, 0), (0, 200, 0), (200, 240, 200), (144, 238, 144), (10, 60, 20), (0, 255, 0)),
    "blue": ((0, 0, 255), (173, 216, 230), (200, 220, 255), (135, 206, 235), (15, 25, 80), (50, 110, 200)),
    "yellow": ((255, 255, 0), (255, 250, 190), (255, 230, 60), (250, 240, 140)),
    "orange": ((255, 165, 0), (255, 140, 0), (240, 120, 30), (255, 190, 110)),
    "purple": ((128, 0, 128), (225, 210, 250), (200, 160, 235), (50, 15, 70), (147, 51, 234)),
    "pink": ((255, 192, 203), (255, 182, 193), (255, 210, 222), (255, 160, 185)),
}
RENDERERS = ("polygon", "distance", "samples")
MIN_CONTRAST = 105.0  # weighted RGB distance between a shape and its background, of 765 at most
FINE = 6  # points across a patch at which its labels are judged
MIN_APART = 0.12  # between the middles of two shapes, as a share of the picture's width


@dataclass(frozen=True)
class Shape:
    """One shape: ``points`` are its corners in pixels, none for a circle of ``radius`` pixels."""

    kind: str
    color: str
    rgb: RGB
    x: float
    y: float
    radius: float
    points: tuple[tuple[float, float], ...] = ()
    outline: RGB | None = None

    @property
    def name(self) -> str:
        """The shape as a noun phrase, e.g. ``an orange star``."""
        article = "an" if self.color[0] in "aeiou" else "a"
        return f"{article} {self.color} {self.kind}"

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom edge in pixels."""
        if not self.points:
            return self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius
        xs, ys = zip(*self.points, strict=True)
        return min(xs), min(ys), max(xs), max(ys)


@dataclass(frozen=True)
class Finish:
    """How a scene is drawn and what its file goes through; ``seed`` fixes the noise."""

    renderer: str = "polygon"
    supersample: int = 3
    softness: float = 0.7  # half width of the soft edge in pixels, for the renderer "distance"
    gradient: tuple[float, float, float] = (0.0, 0.0, 0.0)  # x and y share and strength in levels
    blur: float = 0.0  # pixels
    noise: float = 0.0  # levels, of 255
    jpeg: int | None = None  # quality
    seed: int = 0


@dataclass(frozen=True)
class Scene:
    """A picture of ``width`` by ``height`` pixels; ``shapes`` go left to right."""

    width: int
    height: int
    background: str
    ground: RGB
    shapes: tuple[Shape, ...]
    finish: Finish = Finish()


def corners(kind: str, rng: random.Random) -> list[tuple[float, float]]:
    """Return corners around the origin for one variety of ``kind``, upright, at no particular scale."""
    if kind == "square":
        return [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]
    if kind == "triangle":
        tall = rng.choice((math.sqrt(3) / 2, 1.0, rng.uniform(0.7, 1.2)))
        apex = rng.choice((0.0, 0.0, 0.0, rng.uniform(-0.5, 0.5)))
        return [(apex, -tall), (0.5, 0.0), (-0.5, 0.0)]
    if kind == "star":
        tips = 5 if rng.random() < 0.93 else 6
        inner = rng.choice((0.382, 0.5, rng.uniform(0.35, 0.52))) if tips == 5 else rng.uniform(0.48, 0.58)
        turns = [math.pi * i / tips - math.pi / 2 for i in range(2 * tips)]
        return [(math.cos(t) * r, math.sin(t) * r) for t, r in zip(turns, [1.0, inner] * tips, strict=True)]
    if kind == "cross":
        a = rng.choice((1 / 3, 0.25, rng.uniform(0.18, 0.4)))
        return [
            (-a, -1),
            (a, -1),
            (a, -a),
            (1, -a),
            (1, a),
            (a, a),
            (a, 1),
            (-a, 1),
            (-a, a),
            (-1, a),
            (-1, -a),
            (-a, -a),
        ]
    raise ValueError(f"no corners for {kind!r}")


def make_shape(
    kind: str,
    color: str,
    rgb: RGB,
    middle: tuple[float, float],
    reach: float,
    angle: float,
    rng: random.Random,
) -> Shape:
    """Return a shape whose bounding box has its middle at ``middle`` and ``2 * reach`` as its longer side."""
    x, y = middle
    if kind == "circle":
        return Shape(kind, color, rgb, x, y, reach)
    sin, cos = math.sin(angle), math.cos(angle)
    points = [(cos * u - sin * v, sin * u + cos * v) for u, v in corners(kind, rng)]
    (left, right), (top, bottom) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))
    scale = 2 * reach / max(right - left, bottom - top)
    mid_u, mid_v = (left + right) / 2, (top + bottom) / 2
    placed = tuple((x + (u - mid_u) * scale, y + (v - mid_v) * scale) for u, v in points)
    return Shape(kind, color, rgb, x, y, reach, placed)


def contrast(one: RGB, other: RGB) -> float:
    """Return a distance between two colours that weighs red, green and blue as the eye does ("redmean")."""
    mean = (one[0] + other[0]) / 2
    red, green, blue = (a - b for a, b in zip(one, other, strict=True))
    return math.sqrt((2 + mean / 256) * red**2 + 4 * green**2 + (2 + (255 - mean) / 256) * blue**2)


def jitter(rgb: RGB, by: int, rng: random.Random) -> RGB:
    """Move every channel by at most ``by`` levels."""
    red, green, blue = (min(255, max(0, c + rng.randint(-by, by))) for c in rgb)
    return red, green, blue


def sample_size(rng: random.Random) -> tuple[int, int]:
    """Return a width and a height: 48 to 800 pixels, up to three times as long as high or the reverse."""
    side = math.exp(rng.uniform(math.log(56), math.log(420)))
    aspect = 1.0 if rng.random() < 0.4 else math.exp(rng.uniform(-1.0, 1.0) * math.log(3.0))
    size = (
        max(48, min(800, round(side * math.sqrt(aspect)))),
        max(48, min(800, round(side / math.sqrt(aspect)))),
    )
    return size if max(size) <= 3.2 * min(size) else (min(size), min(size))


def sample_finish(size: tuple[int, int], rng: random.Random) -> Finish:
    """Return a way to draw a picture of ``size``."""
    small = max(size) < 260
    return Finish(
        renderer=rng.choice(RENDERERS),
        supersample=rng.choice((1, 1, 2, 3, 4) if small else (1, 1, 2)),
        softness=rng.choice((0.05, 0.5, 0.7, rng.uniform(0.3, 1.6))),
        gradient=(rng.uniform(-1, 1), rng.uniform(-1, 1), rng.uniform(3, 22) if rng.random() < 0.25 else 0.0),
        blur=rng.uniform(0.2, 0.008 * min(size) + 0.3) if rng.random() < 0.15 else 0.0,
        noise=rng.uniform(0.5, 6.0) if rng.random() < 0.35 else 0.0,
        jpeg=rng.randint(40, 96) if rng.random() < 0.35 else None,
        seed=rng.getrandbits(32),
    )


def sample_scene(rng: random.Random, count: int | None = None) -> Scene:
    """Return a random scene of ``count`` shapes (1 to 3 unless told; 0 is a plain background)."""
    while True:
        wanted = count if count is not None else rng.choices((1, 2, 3), (0.4, 0.35, 0.25))[0]
        width, height = sample_size(rng)
        background = rng.choice(BACKGROUNDS) if rng.random() < 0.6 else rng.choice(("white", "white", "black", "gray"))
        ground = jitter(rng.choice(GROUNDS[background]), 4, rng)
        least = 0.095 * max(width, height)
        most = {0: 1.0, 1: 0.46, 2: 0.28, 3: 0.21}[wanted] * math.sqrt(width * height)
        most = min(most, 0.48 * min(width, height))
        shapes: list[Shape] = []
        for _ in range(60):
            if len(shapes) == wanted or most < least:
                break
            kind, color = rng.choice(KINDS), rng.choice(COLORS)
            rgb = jitter(rng.choice(SHADES[color]), rng.choice((0, 0, 8)), rng)
            if color == background or contrast(rgb, ground) < MIN_CONTRAST:
                continue
            reach = rng.uniform(least, most)
            angle = rng.uniform(0, 2 * math.pi) if rng.random() < 0.5 else 0.0
            shape = make_shape(kind, color, rgb, (0.0, 0.0), reach, angle, rng)
            left, top, right, bottom = shape.box
            if 1 - left + right > width - 1 or 1 - top + bottom > height - 1:
                continue
            middle = rng.uniform(1 - left, width - 1 - right), rng.uniform(1 - top, height - 1 - bottom)
            shape = moved(shape, *middle)
            if rng.random() < 0.06:
                shape = outlined(shape, rng)
            if all(apart(shape, other, width, height) for other in shapes):
                shapes.append(shape)
        if len(shapes) == wanted:
            ordered = tuple(sorted(shapes, key=lambda shape: shape.x))
            return Scene(width, height, background, ground, ordered, sample_finish((width, height), rng))


def moved(shape: Shape, dx: float, dy: float) -> Shape:
    """Return ``shape`` shifted by ``dx`` and ``dy`` pixels."""
    points = tuple((x + dx, y + dy) for x, y in shape.points)
    return Shape(shape.kind, shape.color, shape.rgb, shape.x + dx, shape.y + dy, shape.radius, points, shape.outline)


def outlined(shape: Shape, rng: random.Random) -> Shape:
    """Return ``shape`` with a thin edge, dark or of a darker shade of its own colour."""
    red, green, blue = (int(c * 0.6) for c in shape.rgb)
    edge = rng.choice(((0, 0, 0), (red, green, blue)))
    return Shape(shape.kind, shape.color, shape.rgb, shape.x, shape.y, shape.radius, shape.points, edge)


def apart(one: Shape, other: Shape, width: int, height: int) -> bool:
    """Say whether two shapes neither touch nor leave in doubt which of them is further left."""
    gap = 0.015 * max(width, height)
    a, b = one.box, other.box
    clear = a[2] + gap < b[0] or b[2] + gap < a[0] or a[3] + gap < b[1] or b[3] + gap < a[1]
    return clear and abs(one.x - other.x) >= MIN_APART * width


# --- drawing ---------------------------------------------------------------------------------------


def inside(shape: Shape, xs: Floats, ys: Floats) -> npt.NDArray[np.bool_]:
    """Say which points of the grid ``ys`` [H] by ``xs`` [W] lie in ``shape``: [H, W], even-odd rule."""
    if not shape.points:
        return (xs[None, :] - shape.x) ** 2 + (ys[:, None] - shape.y) ** 2 <= shape.radius**2
    odd = np.zeros((len(ys), len(xs)), dtype=bool)
    for (x0, y0), (x1, y1) in zip(shape.points, shape.points[1:] + shape.points[:1], strict=True):
        if y0 == y1:
            continue
        spans = (ys > min(y0, y1)) & (ys <= max(y0, y1))
        cut = x0 + (ys[spans] - y0) * ((x1 - x0) / (y1 - y0))
        odd[spans] ^= xs[None, :] < cut[:, None]
    return odd


def distance(shape: Shape, xs: Floats, ys: Floats) -> Floats:
    """Return the signed distance of a grid's points to the edge of ``shape``: [H, W] pixels, inside < 0."""
    x, y = xs[None, :], ys[:, None]
    if not shape.points:
        return np.sqrt((x - shape.x) ** 2 + (y - shape.y) ** 2) - np.float32(shape.radius)
    nearest = np.full((len(ys), len(xs)), np.inf, dtype=np.float32)
    for (x0, y0), (x1, y1) in zip(shape.points, shape.points[1:] + shape.points[:1], strict=True):
        ex, ey = x1 - x0, y1 - y0
        along = np.clip(((x - x0) * ex + (y - y0) * ey) / (ex * ex + ey * ey), 0.0, 1.0)
        nearest = np.minimum(nearest, (x - x0 - along * ex) ** 2 + (y - y0 - along * ey) ** 2)
    return np.where(inside(shape, xs, ys), -np.sqrt(nearest), np.sqrt(nearest)).astype(np.float32)


def canvas(scene: Scene) -> Floats:
    """Return the background as [H, W, 3] levels, with its gradient if any."""
    base = np.broadcast_to(np.array(scene.ground, dtype=np.float32), (scene.height, scene.width, 3)).copy()
    across, down, strength = scene.finish.gradient
    if strength:
        xs = np.linspace(-0.5, 0.5, scene.width, dtype=np.float32)
        ys = np.linspace(-0.5, 0.5, scene.height, dtype=np.float32)
        base += ((across * xs[None, :] + down * ys[:, None]) * strength)[..., None]
    return base


def draw_polygons(scene: Scene) -> Image.Image:
    """Draw with Pillow's polygon filling at a multiple of the size, then scale down."""
    k = scene.finish.supersample
    picture = to_image(canvas(scene))
    if k > 1:
        picture = picture.resize((scene.width * k, scene.height * k), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(picture)
    for shape in scene.shapes:
        thick = max(1, round(0.05 * shape.radius * k)) if shape.outline else 0
        if shape.points:
            corner = [(x * k, y * k) for x, y in shape.points]
            pen.polygon(corner, fill=shape.rgb)
            if shape.outline:
                pen.line([*corner, corner[0]], fill=shape.outline, width=thick)
        else:
            box = [edge * k for edge in shape.box]
            pen.ellipse(box, fill=shape.rgb, outline=shape.outline, width=thick or 1)
    if k > 1:
        picture = picture.resize((scene.width, scene.height), Image.Resampling.BOX)
    return picture


def draw_masked(scene: Scene, cover: Callable[[Shape, Floats, Floats], Floats]) -> Image.Image:
    """Draw by blending every shape over the background where ``cover`` says so (a share per pixel)."""
    picture = canvas(scene)
    for shape in scene.shapes:
        left, top, right, bottom = shape.box
        x0, x1 = max(0, int(left) - 3), min(scene.width, int(right) + 5)
        y0, y1 = max(0, int(top) - 3), min(scene.height, int(bottom) + 5)
        xs = np.arange(x0, x1, dtype=np.float32) + np.float32(0.5)
        ys = np.arange(y0, y1, dtype=np.float32) + np.float32(0.5)
        share = cover(shape, xs, ys)[..., None]
        patch = picture[y0:y1, x0:x1]
        patch += share * (np.array(shape.rgb, dtype=np.float32) - patch)
        if shape.outline:
            thick = max(0.5, 0.025 * shape.radius)
            edge = np.clip(thick + 0.5 - np.abs(distance(shape, xs, ys)), 0.0, 1.0)[..., None]
            patch += edge * (np.array(shape.outline, dtype=np.float32) - patch)
    return to_image(picture)


def draw_distance(scene: Scene) -> Image.Image:
    """Draw by signed distances, with an edge as soft as the scene wants it."""
    soft = np.float32(max(scene.finish.softness, 0.02))
    return draw_masked(scene, lambda shape, xs, ys: np.clip(0.5 - distance(shape, xs, ys) / (2 * soft), 0.0, 1.0))


def draw_samples(scene: Scene) -> Image.Image:
    """Draw by testing a few points in every pixel (one: hard edges)."""
    k = min(scene.finish.supersample, 3)

    def cover(shape: Shape, xs: Floats, ys: Floats) -> Floats:
        offsets = ((np.arange(k, dtype=np.float32) + np.float32(0.5)) / k) - np.float32(0.5)
        fine = inside(shape, (xs[:, None] + offsets).ravel(), (ys[:, None] + offsets).ravel())
        return fine.reshape(len(ys), k, len(xs), k).mean(axis=(1, 3), dtype=np.float32)

    return draw_masked(scene, cover)


DRAW: dict[str, Callable[[Scene], Image.Image]] = {
    "polygon": draw_polygons,
    "distance": draw_distance,
    "samples": draw_samples,
}


def to_image(levels: Floats) -> Image.Image:
    """Return [H, W, 3] levels as an RGB picture."""
    return Image.fromarray(np.clip(levels + 0.5, 0, 255).astype(np.uint8), "RGB")


def draw(scene: Scene) -> Image.Image:
    """Return the picture of ``scene`` after its blur, noise and JPEG compression."""
    finish = scene.finish
    picture = DRAW[finish.renderer](scene)
    if finish.blur:
        picture = picture.filter(ImageFilter.GaussianBlur(finish.blur))
    if finish.noise:
        noise = np.random.default_rng(finish.seed).standard_normal((scene.height, scene.width, 3), dtype=np.float32)
        picture = to_image(np.asarray(picture, dtype=np.float32) + noise * np.float32(finish.noise))
    if finish.jpeg is not None:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=finish.jpeg)
        picture = Image.open(file).convert("RGB")
    return picture


@dataclass(frozen=True)
class PatchLabels:
    """What ``grid * grid`` patches of a picture hold, row by row; the shape that covers most of a patch owns it.

    ``owner`` [P]: 0 for none, else 1 for the leftmost shape and so on. ``kind``, ``color`` [P]: counted from 1
    in the order of ``KINDS`` and ``COLORS``, 0 for none. ``mask`` [P, FINE * FINE]: which points of a patch
    any shape covers. ``box`` [P, 4]: from the patch's middle to the middle of its owner's box, across and
    down, and the box's width and height, as shares of the picture's. ``corners`` [P, 2]: how many corners
    that point outwards and inwards lie in it.
    """

    owner: npt.NDArray[np.uint8]
    kind: npt.NDArray[np.uint8]
    color: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.bool_]
    box: npt.NDArray[np.float16]
    corners: npt.NDArray[np.uint8]


def patch_labels(scene: Scene, grid: int) -> PatchLabels:
    """Return what each patch of ``scene`` holds."""
    count = grid * grid
    steps = (np.arange(grid * FINE, dtype=np.float32) + np.float32(0.5)) / (grid * FINE)
    most = np.zeros(count, dtype=np.int64)
    owner, kind, color = (np.zeros(count, dtype=np.uint8) for _ in range(3))
    mask = np.zeros((count, FINE * FINE), dtype=bool)
    box = np.zeros((count, 4), dtype=np.float16)
    bends = np.zeros((count, 2), dtype=np.uint8)
    across, down = ((np.arange(count) % grid + 0.5) / grid, (np.arange(count) // grid + 0.5) / grid)
    for i, shape in enumerate(scene.shapes):
        covered = inside(shape, steps * scene.width, steps * scene.height)
        covered = covered.reshape(grid, FINE, grid, FINE).transpose(0, 2, 1, 3).reshape(count, FINE * FINE)
        mask |= covered
        own = covered.sum(axis=1) > most
        most[own] = covered.sum(axis=1)[own]
        owner[own], kind[own], color[own] = i + 1, KINDS.index(shape.kind) + 1, COLORS.index(shape.color) + 1
        left, top, right, bottom = shape.box
        box[own, 0] = (left + right) / 2 / scene.width - across[own]
        box[own, 1] = (top + bottom) / 2 / scene.height - down[own]
        box[own, 2], box[own, 3] = (right - left) / scene.width, (bottom - top) / scene.height
        points = np.array(shape.points or np.zeros((0, 2)))
        before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
        turns = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]
        outward = turns * turns.sum() > 0
        cells = np.clip(points / (scene.width, scene.height) * grid, 0, grid - 1).astype(np.int64)
        np.add.at(bends, (cells[:, 1] * grid + cells[:, 0], np.where(outward, 0, 1)), 1)
    return PatchLabels(owner, kind, color, mask, box, bends)


def names(shapes: Sequence[Shape]) -> str:
    """Join noun phrases: ``a red circle and a blue square``."""
    return " and ".join(shape.name for shape in shapes)
