"""The training sandbox of AgentScope Runtime, on this project: the same classes, values and names, and async forms.

from backends.agentscope import BFCLSandbox

box = BFCLSandbox()
task = box.get_env_profile(env_type="bfcl")[0]
instance = box.create_instance(env_type="bfcl", task_id=task)["info"]["instance_id"]
"""

from backends.agentscope.asynchronous import (
    AsyncAPPWorldSandbox,
    AsyncBFCLSandbox,
    AsyncSandbox,
    AsyncTrainingSandbox,
    AsyncWebShopSandbox,
)
from backends.agentscope.boxes import APPWorldSandbox, BFCLSandbox, Sandbox, TrainingSandbox, WebShopSandbox
from backends.agentscope.registry import IMAGE_TAG, SandboxConfig, SandboxRegistry, SandboxType, get_image_tag

__all__ = [
    "IMAGE_TAG",
    "APPWorldSandbox",
    "AsyncAPPWorldSandbox",
    "AsyncBFCLSandbox",
    "AsyncSandbox",
    "AsyncTrainingSandbox",
    "AsyncWebShopSandbox",
    "BFCLSandbox",
    "Sandbox",
    "SandboxConfig",
    "SandboxRegistry",
    "SandboxType",
    "TrainingSandbox",
    "WebShopSandbox",
    "get_image_tag",
]
