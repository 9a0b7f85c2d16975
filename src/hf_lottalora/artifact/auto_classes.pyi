# Written by tests/artifact/make_auto_classes_stub.py
import os
from typing import Any

from .auto import AutoLottaLora

__all__ = [
    "AutoLottaLoraModel",
    "AutoLottaLoraModelForAudioClassification",
    "AutoLottaLoraModelForAudioFrameClassification",
    "AutoLottaLoraModelForAudioTokenization",
    "AutoLottaLoraModelForAudioXVector",
    "AutoLottaLoraModelForCTC",
    "AutoLottaLoraModelForCausalLM",
    "AutoLottaLoraModelForDecision",
    "AutoLottaLoraModelForDepthEstimation",
    "AutoLottaLoraModelForDocumentQuestionAnswering",
    "AutoLottaLoraModelForImageClassification",
    "AutoLottaLoraModelForImageMatting",
    "AutoLottaLoraModelForImageSegmentation",
    "AutoLottaLoraModelForImageTextToText",
    "AutoLottaLoraModelForImageToImage",
    "AutoLottaLoraModelForInstanceSegmentation",
    "AutoLottaLoraModelForKeypointDetection",
    "AutoLottaLoraModelForKeypointMatching",
    "AutoLottaLoraModelForMaskGeneration",
    "AutoLottaLoraModelForMaskedImageModeling",
    "AutoLottaLoraModelForMaskedLM",
    "AutoLottaLoraModelForMultimodalLM",
    "AutoLottaLoraModelForMultipleChoice",
    "AutoLottaLoraModelForNextSentencePrediction",
    "AutoLottaLoraModelForNormalEstimation",
    "AutoLottaLoraModelForObjectDetection",
    "AutoLottaLoraModelForPointmapEstimation",
    "AutoLottaLoraModelForPoseEstimation",
    "AutoLottaLoraModelForPreTraining",
    "AutoLottaLoraModelForQuestionAnswering",
    "AutoLottaLoraModelForRNNT",
    "AutoLottaLoraModelForSemanticSegmentation",
    "AutoLottaLoraModelForSeq2SeqLM",
    "AutoLottaLoraModelForSequenceClassification",
    "AutoLottaLoraModelForSpeechSeq2Seq",
    "AutoLottaLoraModelForTDT",
    "AutoLottaLoraModelForTableQuestionAnswering",
    "AutoLottaLoraModelForTableRecognition",
    "AutoLottaLoraModelForTextEncoding",
    "AutoLottaLoraModelForTextRecognition",
    "AutoLottaLoraModelForTextToSpectrogram",
    "AutoLottaLoraModelForTextToWaveform",
    "AutoLottaLoraModelForTimeSeriesPrediction",
    "AutoLottaLoraModelForTokenClassification",
    "AutoLottaLoraModelForUniversalSegmentation",
    "AutoLottaLoraModelForVideoClassification",
    "AutoLottaLoraModelForVisualQuestionAnswering",
    "AutoLottaLoraModelForZeroShotImageClassification",
    "AutoLottaLoraModelForZeroShotObjectDetection",
]

def docstring(auto_name: str) -> str: ...
def loader_for(auto: Any, path: str | os.PathLike[str], **hub: Any) -> tuple[Any, str | None]: ...

class AutoLottaLoraModel(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModel` builds."""

class AutoLottaLoraModelForAudioClassification(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForAudioClassification` builds."""

class AutoLottaLoraModelForAudioFrameClassification(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForAudioFrameClassification` builds."""

class AutoLottaLoraModelForAudioTokenization(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForAudioTokenization` builds."""

class AutoLottaLoraModelForAudioXVector(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForAudioXVector` builds."""

class AutoLottaLoraModelForCTC(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForCTC` builds."""

class AutoLottaLoraModelForCausalLM(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForCausalLM` builds."""

class AutoLottaLoraModelForDecision(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForDecision` builds."""

class AutoLottaLoraModelForDepthEstimation(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForDepthEstimation` builds."""

class AutoLottaLoraModelForDocumentQuestionAnswering(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForDocumentQuestionAnswering` builds."""

class AutoLottaLoraModelForImageClassification(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForImageClassification` builds."""

class AutoLottaLoraModelForImageMatting(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForImageMatting` builds."""

class AutoLottaLoraModelForImageSegmentation(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForImageSegmentation` builds."""

class AutoLottaLoraModelForImageTextToText(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForImageTextToText` builds."""

class AutoLottaLoraModelForImageToImage(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForImageToImage` builds."""

class AutoLottaLoraModelForInstanceSegmentation(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForInstanceSegmentation` builds."""

class AutoLottaLoraModelForKeypointDetection(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForKeypointDetection` builds."""

class AutoLottaLoraModelForKeypointMatching(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForKeypointMatching` builds."""

class AutoLottaLoraModelForMaskGeneration(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForMaskGeneration` builds."""

class AutoLottaLoraModelForMaskedImageModeling(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForMaskedImageModeling` builds."""

class AutoLottaLoraModelForMaskedLM(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForMaskedLM` builds."""

class AutoLottaLoraModelForMultimodalLM(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForMultimodalLM` builds."""

class AutoLottaLoraModelForMultipleChoice(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForMultipleChoice` builds."""

class AutoLottaLoraModelForNextSentencePrediction(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForNextSentencePrediction` builds."""

class AutoLottaLoraModelForNormalEstimation(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForNormalEstimation` builds."""

class AutoLottaLoraModelForObjectDetection(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForObjectDetection` builds."""

class AutoLottaLoraModelForPointmapEstimation(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForPointmapEstimation` builds."""

class AutoLottaLoraModelForPoseEstimation(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForPoseEstimation` builds."""

class AutoLottaLoraModelForPreTraining(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForPreTraining` builds."""

class AutoLottaLoraModelForQuestionAnswering(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForQuestionAnswering` builds."""

class AutoLottaLoraModelForRNNT(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForRNNT` builds."""

class AutoLottaLoraModelForSemanticSegmentation(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForSemanticSegmentation` builds."""

class AutoLottaLoraModelForSeq2SeqLM(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForSeq2SeqLM` builds."""

class AutoLottaLoraModelForSequenceClassification(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForSequenceClassification` builds."""

class AutoLottaLoraModelForSpeechSeq2Seq(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForSpeechSeq2Seq` builds."""

class AutoLottaLoraModelForTDT(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForTDT` builds."""

class AutoLottaLoraModelForTableQuestionAnswering(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForTableQuestionAnswering` builds."""

class AutoLottaLoraModelForTableRecognition(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForTableRecognition` builds."""

class AutoLottaLoraModelForTextEncoding(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForTextEncoding` builds."""

class AutoLottaLoraModelForTextRecognition(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForTextRecognition` builds."""

class AutoLottaLoraModelForTextToSpectrogram(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForTextToSpectrogram` builds."""

class AutoLottaLoraModelForTextToWaveform(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForTextToWaveform` builds."""

class AutoLottaLoraModelForTimeSeriesPrediction(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForTimeSeriesPrediction` builds."""

class AutoLottaLoraModelForTokenClassification(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForTokenClassification` builds."""

class AutoLottaLoraModelForUniversalSegmentation(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForUniversalSegmentation` builds."""

class AutoLottaLoraModelForVideoClassification(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForVideoClassification` builds."""

class AutoLottaLoraModelForVisualQuestionAnswering(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForVisualQuestionAnswering` builds."""

class AutoLottaLoraModelForZeroShotImageClassification(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForZeroShotImageClassification` builds."""

class AutoLottaLoraModelForZeroShotObjectDetection(AutoLottaLora):
    """Loads from an artifact what `transformers.AutoModelForZeroShotObjectDetection` builds."""
