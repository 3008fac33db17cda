"""The operators of the domain `onnx_tricks`, written in plain ONNX.

A model that uses them carries them as model-local functions, so that it runs in any ONNX Runtime;
a native library that registers kernels of the same names takes over where it is loaded.

Each way to cache has an operator of its own. One name with several bodies, told apart by
`overload`, is no way out: ONNX Runtime 1.19 to 1.22 ignore the overload and run whichever body
comes last.
"""
