"""Perceiver IO for the Hugging Face ecosystem: any input array, any output query.

Importing this package makes the Auto classes know `model_type="perceiver_io"`; transformers' own Perceiver
(`model_type="perceiver"`) is left as it is.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageToImage,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from transformers.utils import is_torchvision_available, is_vision_available

from . import recipes
from .arrays import ArrayPart, InputArray, QueryArray
from .builtin import export_builtin, override_builtin, restore_builtin
from .bundled import bundled_checkpoint
from .checkpoint_names import apply_numerics
from .configuration_perceiver_io import PerceiverIOConfig
from .heads_multimodal import PerceiverIOForMultimodalAutoencoding
from .heads_text import (
    PerceiverIOForMaskedLM,
    PerceiverIOForMultipleChoice,
    PerceiverIOForQuestionAnswering,
    PerceiverIOForSequenceClassification,
    PerceiverIOForTokenClassification,
)
from .heads_vision import PerceiverIOForImageClassification, PerceiverIOForOpticalFlow
from .hub import save_with_code
from .modeling_perceiver_io import Encoding, PerceiverIOModel, PerceiverIOPreTrainedModel
from .output_queries import OutputQuery
from .position_encoding import PositionEncoding
from .postprocessors import Postprocessor
from .preprocessors import Preprocessor
from .registry import (
    register_output_query,
    register_position_encoding,
    register_postprocessor,
    register_preprocessor,
    register_stem,
)
from .stems import Stem
from .tokenization_perceiver_io import PerceiverIOTokenizer

__version__ = "0.1.0"

__all__ = [
    "AUTO_CLASSES",
    "ArrayPart",
    "Encoding",
    "InputArray",
    "OutputQuery",
    "PerceiverIOConfig",
    "PerceiverIOForImageClassification",
    "PerceiverIOForMaskedLM",
    "PerceiverIOForMultimodalAutoencoding",
    "PerceiverIOForMultipleChoice",
    "PerceiverIOForOpticalFlow",
    "PerceiverIOForQuestionAnswering",
    "PerceiverIOForSequenceClassification",
    "PerceiverIOForTokenClassification",
    "PerceiverIOModel",
    "PerceiverIOPreTrainedModel",
    "PerceiverIOTokenizer",
    "PositionEncoding",
    "Postprocessor",
    "Preprocessor",
    "QueryArray",
    "Stem",
    "apply_numerics",
    "bundled_checkpoint",
    "export_builtin",
    "override_builtin",
    "recipes",
    "register",
    "register_output_query",
    "register_position_encoding",
    "register_postprocessor",
    "register_preprocessor",
    "register_stem",
    "restore_builtin",
    "save_with_code",
]

AUTO_CLASSES = {
    AutoModel: PerceiverIOModel,
    AutoModelForMaskedLM: PerceiverIOForMaskedLM,
    AutoModelForSequenceClassification: PerceiverIOForSequenceClassification,
    AutoModelForTokenClassification: PerceiverIOForTokenClassification,
    AutoModelForQuestionAnswering: PerceiverIOForQuestionAnswering,
    AutoModelForMultipleChoice: PerceiverIOForMultipleChoice,
    AutoModelForImageClassification: PerceiverIOForImageClassification,
    # transformers has no Auto class for optical flow or autoencoding; these are the nearest.
    AutoModelForImageToImage: PerceiverIOForOpticalFlow,
    AutoModelForPreTraining: PerceiverIOForMultimodalAutoencoding,
}


def register() -> None:
    """Make the Auto classes know this package; done on import, harmless again."""
    AutoConfig.register("perceiver_io", PerceiverIOConfig, exist_ok=True)
    for auto_class, model_class in AUTO_CLASSES.items():
        auto_class.register(PerceiverIOConfig, model_class, exist_ok=True)
    AutoTokenizer.register(PerceiverIOConfig, tokenizer_class=PerceiverIOTokenizer, exist_ok=True)
    if is_vision_available():
        # ImageNet's preprocessing is the same; without torchvision the other name would resolve to this one, noisily.
        from transformers import PerceiverImageProcessorPil
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        processors = {"pil": PerceiverImageProcessorPil}
        if is_torchvision_available():
            from transformers import PerceiverImageProcessor

            processors["torchvision"] = PerceiverImageProcessor
        AutoImageProcessor.register(PerceiverIOConfig, image_processor_classes=processors, exist_ok=True)


register()
