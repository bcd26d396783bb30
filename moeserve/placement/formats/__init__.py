"""Files of others.

::

    routing_files      recorded routing and counts in: ours, and those of SGLang and vLLM
    torchfile          tensors out of a ``torch.save`` file, without torch and running nothing
    archive            members of a zip within a memory budget
    runtimes           plans out and in: SGLang, vLLM-Ascend, TensorRT-LLM, LightLLM
"""
