"""Settings of the worker."""

from __future__ import annotations

from pydantic import Field

from fastserve.common.rpc import RpcSettings
from fastserve.worker.model.files import DEFAULT_MODEL


class Settings(RpcSettings):
    """FastServe worker: runs a model, one iteration of a plan after another."""

    listen: str = Field(
        default="unix:/tmp/fastserve-worker.sock",
        description="address of the gRPC service: unix:/path or host:port",
    )
    worker_id: str = Field(
        default="worker-0", min_length=1, description="stable name; host KV is found again by it"
    )
    model: str = Field(
        default=DEFAULT_MODEL, description="a Hugging Face folder, a .gguf file or the default"
    )
    served_model_name: str = Field(default="", description="name to report (default: --model)")
    device: str = Field(default="auto", description="auto, cpu or cuda")
    dtype: str = Field(default="auto", description="auto, float32, bfloat16 or float16")
    quantization: str = Field(default="none", description="of weights: none or int8 (CPU)")
    cpu_kernels: str = Field(
        default="auto", description="auto, native (or fail) or torch (the slow reference)"
    )
    threads: int = Field(
        default=0,
        ge=0,
        description="CPU threads (0: one for each physical core that affinity and limits leave)",
    )
    tensor_parallel_size: int = Field(
        default=1, ge=1, description="ranks that share every layer (docs/parallel.md)"
    )
    pipeline_parallel_size: int = Field(
        default=1, ge=1, description="stages that the layers are dealt to, each of so many ranks"
    )
    communication: str = Field(
        default="auto", description="of ranks: auto, shared-memory or distributed (NCCL, gloo)"
    )
    max_model_len: int | None = Field(
        default=None, ge=2, description="tokens of prompt and output (default: the model's limit)"
    )
    max_num_seqs: int = Field(default=32, ge=1, description="rows in an iteration at the most")
    max_num_batched_tokens: int = Field(
        default=512, ge=1, description="tokens in an iteration at the most"
    )
    block_size: int = Field(default=16, ge=1, description="tokens in a KV block")
    kv_blocks: int | None = Field(
        default=None, ge=1, description="KV blocks on the device (default: from free memory)"
    )
    gpu_memory_utilization: float = Field(
        default=0.9, gt=0, le=1, description="share of GPU memory for weights and KV together"
    )
    kv_offload: str = Field(
        default="", description="address of the kv-offload sidecar (default: none)"
    )
