"""The fields of a config that mean something here, with the types that the server reads them into.

Types are the machine's (int32, uint32): what does not fit one cannot be read. Whether a *value* is allowed is for the
rules (rules/). Strict: true is no number, "2" is none, and neither is 2.0. Fields that are not here are kept, and
named (known.py). Source: docs/zh/user_guide/user_manual/service_parameter_configuration.md, src/server/conf/config.json
and src/config_manager of Ascend/MindIE-LLM; of `Motor`, examples of Ascend/MindIE-Motor.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

UInt32 = Annotated[int, Field(strict=True, ge=0, lt=2**32)]
Int32 = Annotated[int, Field(strict=True, ge=-(2**31), lt=2**31)]


class Section(BaseModel):
    """An object of the config: strict types, unknown fields kept."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")


class KvCacheOptions(Section):
    """`models.deepseekv2.kv_cache_options`."""

    enable_nz: bool | None = None


class ParallelOptions(Section):
    """`models.deepseekv2.parallel_options`."""

    o_proj_local_tp: Int32 | None = None
    lm_head_local_tp: Int32 | None = None
    dense_mlp_local_tp: Int32 | None = None


class StreamOptions(Section):
    """`models.deepseekv2.stream_options`."""

    micro_batch: bool | None = None


class DeepseekV2(Section):
    """`models.deepseekv2`."""

    stream_options: StreamOptions = StreamOptions()
    kv_cache_options: KvCacheOptions = KvCacheOptions()
    parallel_options: ParallelOptions = ParallelOptions()


class Models(Section):
    """`ModelConfig[0].models`."""

    deepseekv2: DeepseekV2 = DeepseekV2()


class PluginParams(Section):
    """What `plugin_params` holds, as a JSON string or as an object."""

    plugin_type: str | None = None
    num_speculative_tokens: Int32 | None = None


class Model(Section):
    """`ModelConfig[0]`. −1 means "not set" for tp, pp, moe_tp and moe_ep."""

    modelName: str = Field(description="1 to 256 characters of A-Z a-z 0-9 _ . -")
    modelWeightPath: str | None = Field(None, description="a folder with the weights' config.json")
    worldSize: UInt32 = Field(description="number of cards of the whole instance")
    modelInstanceType: str = "Standard"
    backendType: str | None = Field(None, description="atb, ms or torch")
    npuMemSize: Int32 | None = Field(None, description="GB for the KV cache; -1: as much as there is")
    cpuMemSize: UInt32 | None = Field(None, description="GB")
    trustRemoteCode: bool | None = None
    dp: Int32 | None = Field(None, description="data parallel; default 1")
    cp: Int32 | None = Field(None, description="context parallel: 1 or 2; backend torch: up to 32; default 1")
    sp: Int32 | None = Field(None, description="sequence parallel: 1 or tp; default 1")
    tp: Int32 | None = Field(None, description="tensor parallel; default worldSize")
    pp: Int32 | None = Field(None, description="pipeline parallel; default 1")
    moe_ep: Int32 | None = Field(None, description="expert parallel of the MoE layers")
    moe_tp: Int32 | None = Field(None, description="tensor parallel of the MoE layers; default tp; torch: worldSize")
    plugin_params: Any = Field(
        None, description='such as {"plugin_type":"mtp,prefix_cache","num_speculative_tokens":1}'
    )
    models: Models = Models()
    async_scheduler_wait_time: Int32 | None = None
    kv_trans_timeout: Int32 | None = None
    kv_link_timeout: Int32 | None = None


class Deploy(Section):
    """`ModelDeployConfig`."""

    maxSeqLen: UInt32 = Field(2560, description="tokens of prompt and answer")
    maxInputTokenLen: UInt32 = Field(2048, description="tokens of a prompt")
    truncation: bool | Int32 = Field(0, description="older versions: true or false")
    maxLoras: UInt32 | None = None
    maxLoraRank: UInt32 | None = None
    speculationGamma: UInt32 | None = None
    LoraModules: list[Any] | None = None
    ModelConfig: Annotated[list[Model], Field(min_length=1, max_length=1)]


class Schedule(Section):
    """`BackendConfig.ScheduleConfig`."""

    templateType: str = "Standard"
    templateName: str = "Standard_LLM"
    cacheBlockSize: UInt32 = 128
    maxPrefillBatchSize: UInt32 = 50
    maxPrefillTokens: UInt32 = 8192
    prefillTimeMsPerReq: UInt32 = 150
    prefillPolicyType: UInt32 = 0
    decodeTimeMsPerReq: UInt32 = 50
    decodePolicyType: UInt32 = 0
    maxBatchSize: UInt32 = 200
    maxIterTimes: UInt32 = 512
    maxPreemptCount: UInt32 = 0
    supportSelectBatch: bool = False
    maxQueueDelayMicroseconds: UInt32 = 5000
    maxFirstTokenWaitTime: UInt32 = 2500
    maxN: UInt32 | None = None
    maxBeamWidth: UInt32 | None = Field(default=None, description="older name of maxN")
    policyType: UInt32 | None = None
    stageSelectPolicy: UInt32 | None = None
    prefillExpectedTime: UInt32 | None = None
    decodeExpectedTime: UInt32 | None = None
    maxNumPartialPrefills: UInt32 | None = None
    maxLongPartialPrefills: UInt32 | None = None
    longPrefillTokenThreshold: UInt32 | None = None
    splitChunkTokens: UInt32 | None = None
    bufferResponseEnabled: bool = False
    distributedEnable: bool = Field(
        default=False, description="each process serves one data-parallel rank of a larger world"
    )


class KvPool(Section):
    """`BackendConfig.kvPoolConfig`."""

    backend: str | None = None
    configPath: str | None = None
    asyncWrite: bool = False


class Backend(Section):
    """`BackendConfig`, without ModelDeployConfig, which may stand elsewhere."""

    backendName: str | None = None
    tokenizerProcessNumber: UInt32 | None = None
    npuDeviceIds: list[list[UInt32]] | None = None
    multiNodesInferEnabled: bool = False
    multiNodesInferPort: UInt32 = 1120
    modelInstanceNumber: UInt32 | None = None
    interNodeTLSEnabled: bool = False
    interNodeTlsCaFiles: Any = None
    interNodeTlsCrlFiles: Any = None
    kvPoolConfig: KvPool = KvPool()
    ScheduleConfig: Schedule = Schedule()


class HealthCheck(Section):
    """`ServerConfig.HealthCheckConfig`."""

    npuUsageThreshold: UInt32 | None = None


class Server(Section):
    """`ServerConfig`: what decides how attention is deployed, and what the server checks before it starts."""

    ipAddress: str | None = None
    managementIpAddress: str | None = None
    allowAllZeroIpListening: bool = False
    port: UInt32 | None = None
    managementPort: UInt32 | None = None
    metricsPort: UInt32 | None = None
    interCommTLSEnabled: bool = False
    interCommPort: UInt32 | None = None
    maxLinkNum: UInt32 | None = None
    tokenTimeout: UInt32 | None = None
    e2eTimeout: UInt32 | None = None
    maxRequestLength: UInt32 | None = None
    maxJsonDepth: UInt32 | None = None
    httpsEnabled: bool = False
    tlsCaFile: Any = None
    tlsCrlFiles: Any = None
    openAiSupport: str | None = None
    inferMode: str = "standard"
    distDPServerEnabled: bool = False
    HealthCheckConfig: HealthCheck = HealthCheck()
    layerwiseDisaggregated: bool = False
    layerwiseDisaggregatedRoleType: str | None = None
    layerwiseDisaggregatedMasterIpAddress: str | None = None
    layerwiseDisaggregatedSlaveIpAddress: Any = None
    layerwiseDisaggregatedDataPort: UInt32 | None = None
    layerwiseDisaggregatedCrtlPort: Any = None


class Motor(Section):
    """`deploy_config` of MindIE-Motor's user_config.json: how many instances, pods and NPUs."""

    p_instances_num: UInt32 | None = None
    d_instances_num: UInt32 | None = None
    single_p_instance_pod_num: UInt32 | None = None
    single_d_instance_pod_num: UInt32 | None = None
    p_pod_npu_num: UInt32 | None = None
    d_pod_npu_num: UInt32 | None = None
    prefill_distribute_enable: Int32 | None = None
    decode_distribute_enable: Int32 | None = None
    hardware_type: str | None = None


class _BackendFile(Backend):
    """`BackendConfig`, as it stands in a file."""

    ModelDeployConfig: Deploy | None = None


class ConfigJson(Section):
    """A whole config.json, or an object with ModelDeployConfig."""

    ServerConfig: Server = Server()
    BackendConfig: _BackendFile | None = None
    ModelDeployConfig: Deploy | None = None
