import io
import struct
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, ImageOps

from underpaint.data import Unreadable, decode, read_header
from underpaint.data.decode import alpha_weighted_sum

pytestmark = pytest.mark.quick
NOISE = np.random.default_rng(0)


def pixels(*shape: int, dtype: str = "uint8") -> np.ndarray:
    return NOISE.integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


def encoded(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def deep_png(array: np.ndarray) -> bytes:
    return bytes(imagecodecs.png_encode(array))


def agrees(data: bytes, **options) -> np.ndarray:
    """Decode, and check that the header told the truth."""
    array = decode(data, channels=None, **options)
    header = read_header(data)
    assert (header.height, header.width, header.channels) == array.shape
    assert header.dtype == array.dtype.name
    return array


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP", "TIFF", "JPEG"])
def test_common_formats_give_rgb(kind):
    smooth = np.linspace(0, 255, 12 * 10 * 3).reshape(12, 10, 3).astype(np.uint8)
    array = agrees(encoded(smooth, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert array.shape == (12, 10, 3)
    if kind in ("PNG", "BMP", "WEBP", "TIFF"):
        np.testing.assert_array_equal(array, smooth)
    else:
        assert np.abs(array.astype(int) - smooth).mean() < 12


def test_grey_is_copied_and_colour_becomes_luma():
    grey, colour = pixels(5, 6), pixels(5, 6, 3)
    np.testing.assert_array_equal(decode(encoded(grey, "PNG")), np.repeat(grey[..., None], 3, 2))
    luma = decode(encoded(colour, "PNG"), channels=1)
    np.testing.assert_allclose(luma[..., 0], colour @ [0.299, 0.587, 0.114], atol=0.51)
    assert decode(encoded(grey, "PNG"), channels=None).shape == (5, 6, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_orientation_is_applied(orientation, kind):
    image = Image.fromarray(pixels(5, 7, 3))
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(image, kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(agrees(data), expected)


def test_alpha_is_composed_on_the_background():
    colour, alpha = pixels(4, 4, 3), pixels(4, 4)
    data = encoded(np.dstack([colour, alpha]), "PNG")
    share = alpha[..., None] / 255
    expected = colour * share + np.array([0.2, 0.4, 0.6]) * 255 * (1 - share)
    np.testing.assert_allclose(decode(data, background=(0.2, 0.4, 0.6)), expected, atol=0.51)
    np.testing.assert_array_equal(decode(data, channels=4), np.dstack([colour, alpha]))
    assert agrees(data).shape == (4, 4, 3)
    grey = encoded(Image.new("LA", (3, 2), (9, 0)), "PNG")
    assert (decode(grey, channels=1, background=1.0) == 255).all()


def test_palettes():
    image = Image.fromarray(pixels(8, 8, 3)).quantize(16)
    data = encoded(image, "PNG")
    np.testing.assert_array_equal(agrees(data), np.asarray(image.convert("RGB")))
    clear = encoded(image, "PNG", transparency=0)
    seen = decode(clear, background=1.0)
    assert (seen[np.asarray(image) == 0] == 255).all()
    index = pixels(4, 4)
    colours = pixels(3, 256, dtype="uint16")
    np.testing.assert_array_equal(agrees(tiff(index, photometric="palette", colormap=colours)), colours.T[index] >> 8)


def test_cmyk_becomes_rgb():
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    for kind in ("JPEG", "TIFF"):
        cyan = agrees(encoded(image, kind))
        np.testing.assert_allclose(cyan[8, 8], [0, 255, 255], atol=4)


def test_16_bit_png_keeps_its_bits():
    for shape in [(5, 6), (5, 6, 3)]:
        array = pixels(*shape, dtype="uint16")
        np.testing.assert_array_equal(agrees(deep_png(array)).reshape(shape), array)
    rgba = pixels(5, 6, 4, dtype="uint16")
    data = deep_png(rgba)
    assert agrees(data).shape == (5, 6, 3)
    share = rgba[..., 3:] / 65535
    np.testing.assert_allclose(decode(data, background=0.0), rgba[..., :3] * share, atol=1)


def test_tiff_keeps_depth_and_channels():
    wide = pixels(6, 7, 3, dtype="uint16")
    np.testing.assert_array_equal(agrees(tiff(wide, photometric="rgb")), wide)
    real = NOISE.normal(size=(6, 7)).astype(np.float32)
    np.testing.assert_array_equal(agrees(tiff(real))[..., 0], real)
    real[0, 0] = np.nan
    assert np.isfinite(decode(tiff(real))).all()
    five = pixels(6, 7, 5, dtype="uint16")
    last = tiff(five, photometric="minisblack", planarconfig="contig")
    planar = tiff(five.transpose(2, 0, 1), photometric="minisblack", planarconfig="separate")
    pages = tiff(five.transpose(2, 0, 1))
    for data in (last, planar, pages):
        np.testing.assert_array_equal(agrees(data), five)
        np.testing.assert_array_equal(decode(data, channels=5), five)
        with pytest.raises(Unreadable, match="has 5 channels, expected 3"):
            decode(data)


def test_tiff_kinds():
    grey = pixels(6, 7)
    np.testing.assert_array_equal(agrees(tiff(grey, photometric="miniswhite"))[..., 0], 255 - grey)
    stack = pixels(4, 6, 7)
    np.testing.assert_array_equal(agrees(tiff(stack, imagej=True, metadata={"axes": "ZYX"}))[..., 0], stack[0])
    channels = tiff(stack, imagej=True, metadata={"axes": "CYX"})
    np.testing.assert_array_equal(agrees(channels), stack.transpose(1, 2, 0))
    bits = encoded(Image.fromarray(grey > 127), "TIFF")
    np.testing.assert_array_equal(agrees(bits)[..., 0], (grey > 127) * 255)
    for compression in ("deflate", "lzw", "jpeg"):
        assert agrees(tiff(pixels(16, 16, 3), compression=compression, photometric="rgb")).shape == (16, 16, 3)
    with pytest.raises(Unreadable, match="complex"):
        decode(tiff(np.ones((4, 4), np.complex64)))
    four = pixels(6, 7, 4)
    np.testing.assert_array_equal(decode(tiff(four, photometric="rgb", extrasamples=["unassalpha"]), channels=4), four)


def test_premultiplied_alpha_of_a_tiff_is_not_multiplied_again():
    colour, alpha = pixels(8, 8, 3), pixels(8, 8)
    share = alpha[..., None] / 255
    multiplied = np.rint(colour * share).astype(np.uint8)
    data = tiff(np.dstack([multiplied, alpha]), photometric="rgb", extrasamples=["assocalpha"])
    straight = tiff(np.dstack([colour, alpha]), photometric="rgb", extrasamples=["unassalpha"])
    expected = colour * share + np.array([0.2, 0.4, 0.6]) * 255 * (1 - share)
    for each in (data, straight):
        np.testing.assert_allclose(decode(each, background=(0.2, 0.4, 0.6)), expected, atol=1.01)
    sums = [alpha_weighted_sum(each, channels=3) for each in (data, straight)]
    np.testing.assert_allclose(sums[0][0], sums[1][0], atol=64 * 0.5 / 255)
    assert sums[0][1] == pytest.approx(alpha.sum() / 255)


@pytest.mark.parametrize("compression", [None, "lzw", "deflate"])
def test_ycbcr_tiff_without_jpeg_becomes_rgb(compression):
    image = Image.fromarray(pixels(16, 16, 3)).convert("YCbCr")
    data = tiff(np.asarray(image), photometric="ycbcr", compression=compression)
    np.testing.assert_allclose(agrees(data), np.asarray(image.convert("RGB")), atol=1)
    if compression is None:
        written = encoded(image, "TIFF")
        np.testing.assert_allclose(agrees(written), np.asarray(Image.open(io.BytesIO(written)).convert("RGB")), atol=1)


def test_lab_tiff_becomes_rgb():
    """Written by PIL and Little CMS."""
    axis = np.linspace(0, 255, 8)
    colours = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(16, 32, 3).astype(np.uint8)
    lab = ImageCms.profileToProfile(
        Image.fromarray(colours), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    error = np.abs(agrees(encoded(lab, "TIFF")).astype(int) - colours)
    assert error.mean() < 1  # 8 bits of L*a*b* are coarser than those of RGB
    assert np.quantile(error, 0.99) <= 8
    signed = tifffile.imread(io.BytesIO(encoded(lab, "TIFF")))
    icc = tiff(signed ^ np.array([0, 128, 128], np.uint8), photometric="icclab")
    np.testing.assert_array_equal(agrees(icc), agrees(encoded(lab, "TIFF")))
    with pytest.raises(Unreadable, match="CIELAB TIFF of type uint16"):
        decode(tiff(pixels(4, 4, 3, dtype="uint16"), photometric="cielab"))


def test_few_bits_of_a_tiff_span_all_of_8_bit():
    index = (pixels(6, 8) % 16).astype(np.uint8)
    for kind in ("minisblack", "miniswhite"):
        data = tiff(index, bitspersample=4, photometric=kind)
        np.testing.assert_array_equal(agrees(data)[..., 0], np.asarray(Image.open(io.BytesIO(data)).convert("L")))
    packed = pixels(6, 8, dtype="uint16") % 4096
    np.testing.assert_array_equal(agrees(tiff(packed, bitspersample=12, photometric="minisblack"))[..., 0], packed)
    inverted = tiff(packed, bitspersample=12, photometric="miniswhite")
    np.testing.assert_array_equal(agrees(inverted)[..., 0], 4095 - packed)


@pytest.mark.parametrize("bands", [4, 10])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "int16"])
def test_bands_of_every_layout_and_type_are_kept(bands, dtype):
    array = (NOISE.random((8, 9, bands)) * 200).astype(dtype)
    planar = np.ascontiguousarray(array.transpose(2, 0, 1))
    for data in (
        tiff(array, photometric="minisblack", planarconfig="contig"),
        tiff(planar, photometric="minisblack", planarconfig="separate"),
        tiff(planar, photometric="minisblack"),
        tiff(array, photometric="rgb", planarconfig="contig", extrasamples=["unspecified"] * (bands - 3)),
    ):
        np.testing.assert_array_equal(agrees(data), array)


def test_a_stack_gives_its_first_page():
    stack = pixels(5, 6, 7)
    frames = [Image.fromarray(frame) for frame in stack]
    pages = encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for frame in stack:
            writer.write(frame, contiguous=False, photometric="minisblack")
    depth = tiff(stack, ome=True, metadata={"axes": "ZYX"}, photometric="minisblack")
    for data in (pages, buffer.getvalue(), depth):
        np.testing.assert_array_equal(agrees(data)[..., 0], stack[0])


def test_animation_gives_its_first_frame():
    first, second = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 255, 0))
    data = encoded(first, "GIF", save_all=True, append_images=[second])
    assert (decode(data)[0, 0] == [255, 0, 0]).all()


def test_reduced_jpeg_is_not_below_what_is_wanted():
    data = encoded(pixels(400, 640, 3), "JPEG")
    assert decode(data, reduce_to=100).shape == (100, 160, 3)
    assert decode(data, reduce_to=101).shape == (200, 320, 3)
    assert decode(data, reduce_to=1000).shape == (400, 640, 3)


def huge_png(width: int = 60_000, height: int = 60_000) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def broken_files() -> dict[str, tuple[bytes, str]]:
    """Bytes of broken files by name, each with what its reason must contain."""
    jpeg, png = encoded(pixels(64, 64, 3), "JPEG"), encoded(pixels(64, 64, 3), "PNG")
    deep = deep_png(pixels(32, 32, 3, dtype="uint16"))
    flat = tiff(pixels(32, 32, 3), photometric="rgb")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    return {
        "empty.jpg": (b"", "empty"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "truncated.png": (png[: len(png) // 2], "truncated"),
        "truncated16.png": (deep[: len(deep) // 2], "truncated"),
        "truncated.tif": (flat[: len(flat) // 2], "truncated"),
        "truncated.webp": (encoded(pixels(64, 64, 3), "WEBP")[:900], ""),
        "truncated.bmp": (encoded(pixels(64, 64, 3), "BMP")[:900], "truncated"),
        "truncated.gif": (encoded(pixels(64, 64, 3), "GIF")[:900], ""),
        "text.jpg": (b"this is not an image", "this is"),
        "cuthead.jpg": (jpeg[:12], ""),
        "nohead.jpg": (jpeg[40:], "not a JPEG"),
        "huge.png": (huge_png(), "60000 x 60000"),
        "zip.png": (b"PK\x03\x04" + bytes(100), "not a JPEG"),
        "crc.png": (bytes(flipped), ""),
        "channels.tif": (tiff(pixels(8, 8, 5), photometric="minisblack", planarconfig="contig"), "5 channels"),
        "header.tif": (b"II*\0" + bytes(50), ""),
        "startonly.png": (png[:10], "damaged PNG"),
    }


@pytest.mark.parametrize("name", list(broken_files()))
def test_broken_files_have_a_reason(name):
    data, reason = broken_files()[name]
    with pytest.raises(Unreadable) as caught:
        decode(data)
    text = str(caught.value)
    assert reason in text
    assert "\n" not in text
    assert "0x" not in text
    assert len(text) < 250


def test_size_limit_is_ours_alone():
    white = encoded(Image.new("1", (10_000, 10_000)), "PNG")  # PIL would warn of a bomb here
    assert read_header(white).height == 10_000
    with pytest.raises(Unreadable, match="10000 x 10000"):
        decode(white, max_pixels=1000)
    claim = tiff(pixels(8, 8))
    with pytest.raises(Unreadable, match="8 x 8"):
        decode(claim, max_pixels=60)


def test_odd_metadata_does_not_refuse_an_image():
    data = encoded(pixels(8, 8, 3), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(20))
    assert decode(data).shape == (8, 8, 3)


def write_broken(folder: Path) -> list[str]:
    """Every broken file, and a folder with the name of an image; their names."""
    for name, (data, _) in broken_files().items():
        (folder / name).write_bytes(data)
    (folder / "folder.jpg").mkdir()
    return sorted([*broken_files(), "folder.jpg"])
