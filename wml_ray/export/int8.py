"""Static post-training quantisation of an ONNX file to int8, by onnxruntime's own tools."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from wml_ray.errors import UserError, one_line, root_cause
from wml_ray.export.formats import INPUT, Array, require

CALIBRATION_IMAGES = 512
BATCH = 32


def quantise(folder: Path, images: Array) -> None:
    """Replace `model.onnx` in `folder` by its int8 form: weights per channel, activations calibrated on `images`.

    Raises:
        UserError: onnxruntime is missing, or cannot quantise this network.
    """
    require("onnxruntime", "onnx")
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter([{INPUT: images[start : start + BATCH]} for start in range(0, len(images), BATCH)])

        def get_next(self) -> Any:
            return next(self.batches, None)

    model, prepared = folder / "model.onnx", folder / "prepared.onnx"
    root = logging.getLogger()  # to which onnxruntime's tools log
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        quant_pre_process(str(model), str(prepared))
        quantize_static(
            str(prepared),
            str(model),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    except Exception as error:  # of the tools, which raise many types
        raise UserError(
            f"int8: onnxruntime cannot quantise the network ({one_line(root_cause(error))}); export it without --int8"
        ) from error
    finally:
        root.setLevel(level)
        prepared.unlink(missing_ok=True)
