"""Perceiver IO for the Hugging Face ecosystem: any input array, any output query.

Importing this package makes the Auto classes know `model_type="perceiver_io"`; transformers' own Perceiver
(`model_type="perceiver"`) is left as it is.
"""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForImageToImage,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForVideoClassification,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import is_torchvision_available, is_vision_available

from . import recipes
from .arrays import ArrayPart, InputArray, QueryArray
from .builtin import export_builtin, override_builtin, restore_builtin
from .bundled import bundled_checkpoint
from .checkpoint_names import apply_numerics
from .configuration_perceiver_io import PerceiverIOConfig
from .feature_extraction_perceiver_io import PerceiverIOFeatureExtractor
from .heads_multimodal import (
    PerceiverIOForAudioClassification,
    PerceiverIOForAudioVisualClassification,
    PerceiverIOForMultimodalAutoencoding,
    PerceiverIOForVideoClassification,
)
from .heads_text import (
    PerceiverIOForMaskedLM,
    PerceiverIOForMultipleChoice,
    PerceiverIOForMultitaskSequenceClassification,
    PerceiverIOForQuestionAnswering,
    PerceiverIOForSequenceClassification,
    PerceiverIOForTokenClassification,
)
from .heads_vision import PerceiverIOForImageClassification, PerceiverIOForOpticalFlow
from .hub import save_with_code
from .image_processing_perceiver_io import PerceiverIOFlowImageProcessor
from .modeling_perceiver_io import Encoding, PerceiverIOModel, PerceiverIOPreTrainedModel
from .output_queries import OutputQuery
from .pipeline_fill_mask import PerceiverIOFillMaskPipeline, register_fill_mask
from .pipeline_multimodal_autoencoding import MultimodalAutoencodingPipeline
from .pipeline_optical_flow import OpticalFlowPipeline
from .position_encoding import PositionEncoding
from .postprocessors import Postprocessor
from .preprocessors import Preprocessor
from .processing_perceiver_io import PerceiverIOProcessor
from .registry import (
    register_output_query,
    register_position_encoding,
    register_postprocessor,
    register_preprocessor,
    register_stem,
)
from .stems import Stem
from .tokenization_perceiver_io import PerceiverIOTokenizer
from .video_processing_perceiver_io import PerceiverIOVideoProcessor

__version__ = "0.1.0"

__all__ = [
    "AUTO_CLASSES",
    "ArrayPart",
    "Encoding",
    "InputArray",
    "MultimodalAutoencodingPipeline",
    "OpticalFlowPipeline",
    "PerceiverIOFillMaskPipeline",
    "OutputQuery",
    "PerceiverIOConfig",
    "PerceiverIOFeatureExtractor",
    "PerceiverIOFlowImageProcessor",
    "PerceiverIOForAudioClassification",
    "PerceiverIOForAudioVisualClassification",
    "PerceiverIOForImageClassification",
    "PerceiverIOForMaskedLM",
    "PerceiverIOForMultimodalAutoencoding",
    "PerceiverIOForMultipleChoice",
    "PerceiverIOForMultitaskSequenceClassification",
    "PerceiverIOForOpticalFlow",
    "PerceiverIOForQuestionAnswering",
    "PerceiverIOForSequenceClassification",
    "PerceiverIOForTokenClassification",
    "PerceiverIOForVideoClassification",
    "PerceiverIOModel",
    "PerceiverIOPreTrainedModel",
    "PerceiverIOProcessor",
    "PerceiverIOTokenizer",
    "PerceiverIOVideoProcessor",
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
    AutoModelForAudioClassification: PerceiverIOForAudioClassification,
    AutoModelForVideoClassification: PerceiverIOForVideoClassification,
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

        # From its file: the top level has it only where torchvision is.
        from transformers.models.auto.video_processing_auto import AutoVideoProcessor

        processors = {"pil": PerceiverImageProcessorPil}
        if is_torchvision_available():
            from transformers import PerceiverImageProcessor

            processors["torchvision"] = PerceiverImageProcessor
        AutoImageProcessor.register(PerceiverIOConfig, image_processor_classes=processors, exist_ok=True)
        # Found by the `image_processor_type` in its file. Of one entry's classes transformers takes the first that the
        # backend allows, so this has an entry of its own, whose key is no configuration.
        for own in (PerceiverIOFlowImageProcessor, PerceiverIOVideoProcessor):
            AutoImageProcessor.register(own, image_processor_classes={"pil": own, "torchvision": own}, exist_ok=True)
        AutoVideoProcessor.register(PerceiverIOVideoProcessor, PerceiverIOVideoProcessor, exist_ok=True)
    # Not under PerceiverIOConfig either: AutoProcessor would try this class on the folders of text models.
    AutoFeatureExtractor.register(PerceiverIOFeatureExtractor, PerceiverIOFeatureExtractor, exist_ok=True)
    AutoProcessor.register(PerceiverIOProcessor, PerceiverIOProcessor, exist_ok=True)
    # Not by `register_pipeline`, whose mark on the class makes a saved pipeline ask for trust_remote_code.
    PIPELINE_REGISTRY.supported_tasks["optical-flow"] = {
        "impl": OpticalFlowPipeline,
        "pt": (AutoModelForImageToImage,),
        "type": "image",
    }
    PIPELINE_REGISTRY.supported_tasks["multimodal-autoencoding"] = {
        "impl": MultimodalAutoencodingPipeline,
        "pt": (AutoModelForPreTraining,),
        "type": "multimodal",
    }

    register_fill_mask(PIPELINE_REGISTRY.supported_tasks["fill-mask"])


register()
