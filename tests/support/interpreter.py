"""Repairs of Triton's interpreter, which gets bfloat16 silently wrong and float arguments not at all, and is slow.

It keeps bfloat16 as uint16 and then truncates where hardware rounds to nearest even, adds the bits of two numbers as
integers, and hands floats to kernels unwrapped. Conversions here go through torch. NaN is to hardware the integer 0,
and the lesser of two numbers, unless it is told otherwise. Not repaired: reductions of bfloat16 and atomics on it, so a
kernel widens what it loads first, as on the GPU.
"""

import numpy as np
import torch
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import libdevice as cuda_libdevice
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder, TensorHandle

TORCH = {
    tl.float64: torch.float64,
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
BITS = {tl.bfloat16: torch.uint16, tl.float8e4nv: torch.uint8, tl.float8e5: torch.uint8}


def convert(data, source, target):
    """An array of one floating-point type in another, rounded to nearest even."""
    numbers = torch.from_numpy(np.array(data, order="C"))
    numbers = numbers.view(TORCH[source]) if source in BITS else numbers
    numbers = numbers.to(TORCH[target])
    return (numbers.view(BITS[target]) if target in BITS else numbers).numpy()


def widened(handle):
    """A handle whose numbers numpy understands."""
    source = handle.dtype.scalar
    return TensorHandle(convert(handle.data, source, tl.float32), tl.float32) if source in BITS else handle


def repair_casts():
    cast = InterpreterBuilder.cast_impl

    def cast_impl(self, handle, target):
        source, target = handle.dtype.scalar, target.scalar
        if source in TORCH and target in TORCH:
            return TensorHandle(convert(handle.data, source, target), target)
        if target in BITS:
            return TensorHandle(convert(handle.data.astype(np.float32), tl.float32, target), target)
        handle = widened(handle)
        if source in TORCH:
            handle = TensorHandle(np.where(np.isnan(handle.data), 0, handle.data), handle.dtype)
        return cast(self, handle, target)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = lambda self, handle, target, rounding: self.cast_impl(handle, target)
    InterpreterBuilder.get_bf16 = lambda self, value: TensorHandle(
        convert(np.array([value], np.float32), tl.float32, tl.bfloat16), tl.bfloat16
    )


def repair_arithmetic():
    binary, unary, dot = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op, InterpreterBuilder.create_dot

    def narrowed(self, result, operand):
        is_number = result.data.dtype != np.bool_
        return self.cast_impl(result, tl.bfloat16) if operand.dtype.scalar == tl.bfloat16 and is_number else result

    def binary_op(self, left, right, operation):
        return narrowed(self, binary(self, widened(left), widened(right), operation), left)

    def unary_op(self, operand, operation):
        return narrowed(self, unary(self, widened(operand), operation), operand)

    InterpreterBuilder.binary_op = binary_op
    InterpreterBuilder.unary_op = unary_op
    InterpreterBuilder.create_maxnumf = lambda self, left, right: self.binary_op(left, right, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, left, right: self.binary_op(left, right, np.fmin)
    InterpreterBuilder.create_dot = lambda self, left, right, *others: dot(self, widened(left), widened(right), *others)


def repair_float_arguments():
    wrap = interpreter._implicit_cvt

    def implicit_cvt(argument):
        if type(argument) is float:
            return tl.tensor(TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return wrap(argument)

    interpreter._implicit_cvt = implicit_cvt


def repair_libdevice():
    """NVIDIA's device functions that other libraries' kernels call by name."""

    def named(name):  # looked up when called: the interpreter replaces tl.math's functions while a kernel runs
        return lambda x: getattr(tl.math, name)(x)

    for module in (libdevice, cuda_libdevice):
        for name in ("rsqrt", "exp", "log"):
            setattr(module, name, named(name))
        module.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1


def spare_repetitions():
    """A third of an interpreted kernel's time: every call of a device function replaces the language's functions,
    which last until the launch ends, and every result has a table of numpy's types made."""
    launch, numpy_type, replaced, known = GridExecutor.__call__, interpreter._get_np_dtype, set(), {}

    def launched(self, *args, **options):
        replaced.clear()
        try:
            return launch(self, *args, **options)
        finally:
            replaced.clear()

    def device_function(self, *args, **options):
        if (module := id(self.fn.__globals__)) not in replaced:
            replaced.add(module)
            interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **options)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    def looked_up(kind):
        if isinstance(kind.scalar, tl.pointer_type):
            return numpy_type(kind)
        if (name := kind.scalar.name) not in known:
            known[name] = numpy_type(kind.scalar)
        return known[name]

    GridExecutor.__call__, InterpretedFunction.__call__ = launched, device_function
    interpreter._get_np_dtype = looked_up


def repair():
    """Once per process."""
    repair_casts()
    repair_arithmetic()
    repair_float_arguments()
    spare_repetitions()
