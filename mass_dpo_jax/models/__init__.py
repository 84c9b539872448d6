"""The decoder, its weights, and the forward pass in which a prompt's responses share it.

Computation, from the outside in:

    shared_prefix.py    score: log-probabilities and features of all responses of a prompt
    replay.py           replay: the recorded scores of some of them, to be differentiated
    response_layout.py  how responses are laid out after the prompt; taking picks out
    decoder.py          Decoder: token ids in, final hidden states out
    block.py            one layer
    attention.py        attention in plain operations: causal, and responses after a prompt
    fused_attention.py  the same by cuDNN's kernel, and where it can be used
    rotary.py           rotary positions
    logprobs.py         log-probabilities of tokens without all logits
    lora.py             adapters, and adding them to their weights
    quantize.py         frozen weights in 4 or 8 bits
    precomputed.py      recorded values in differentiated programs
    interfaces.py       types that several of these share, and the letters of shapes

Files:

    config.py           DecoderConfig, from and to config.json
    fields.py           typed access to a config.json
    weights.py          weights of a Hugging Face folder, read and written
    peft_format.py      adapters in PEFT's folders, read and written
    hf_folder.py        whole models written as Hugging Face folders
    tensors.py          safetensors files
    folder.py           what a folder holds in place of what was expected
"""
