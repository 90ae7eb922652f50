"""Move a candidate to its final place; impossible without a `GuardPassed` for that very file."""

from collections import Counter

from qatlora import files
from qatlora.errors import ExportError
from qatlora.export.candidate import Candidate, GuardPassed
from qatlora.llamacpp.gguf_read import read_gguf
from qatlora.report.results import ExportResult


def publish(candidate: Candidate, passed: GuardPassed) -> ExportResult:
    """Rename the candidate to its final path and say what lies there.

    Raises:
        ExportError: the candidate is not the file that the guard judged.
    """
    sha256 = files.sha256_of_file(candidate.path)
    if sha256 != passed.candidate_sha256:
        raise ExportError(
            f"{candidate.path} has SHA-256 {sha256}, and the guard judged a file with "
            f"{passed.candidate_sha256}: it was changed in between. Run recipe=export_gguf again."
        )
    types = Counter(tensor.type_name for tensor in read_gguf(candidate.path).tensors.values())
    files.finish(candidate.path)
    candidate.path.replace(candidate.final_path)
    candidate.discard()
    return ExportResult(
        path=str(candidate.final_path),
        sha256=sha256,
        bytes=candidate.final_path.stat().st_size,
        tensor_types=dict(sorted(types.items())),
    )
