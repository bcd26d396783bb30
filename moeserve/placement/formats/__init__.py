"""Files of others.

::

    routing_files      recorded routing and counts in: ours, and those of SGLang and vLLM
    torchfile          tensors out of a ``torch.save`` file, without torch and running nothing
    runtimes           plans out and in: SGLang, vLLM-Ascend, TensorRT-LLM, LightLLM
"""
