// SPDX-License-Identifier: Apache-2.0
#include "core/check.h"

#include <stdexcept>

namespace fastpost {
namespace {

std::string shape_text(const int64_t* shape, int ndim) {
  std::string s = "[";
  for (int i = 0; i < ndim; ++i) {
    if (i) s += ", ";
    s += shape[i] == kAny ? "any" : std::to_string(shape[i]);
  }
  return s + "]";
}

std::string expected_text(std::initializer_list<DType> dtypes, std::initializer_list<int64_t> shape) {
  std::string s;
  for (DType t : dtypes) s += (s.empty() ? "" : " or ") + std::string(name(t));
  return s + " " + shape_text(shape.begin(), static_cast<int>(shape.size()));
}

std::string device_text(const Tensor& t) {
  if (t.device == Device::CPU) return "cpu";
  return (t.device == Device::CUDA ? "cuda:" : "device:") + std::to_string(t.device_index);
}

}  // namespace

void fail(const char* op, const char* argument, const std::string& expected, const std::string& got,
          const char* what_to_do) {
  std::string text = "[" + std::string(op) + "] " + argument + ": expected " + expected + ", got " + got + ".";
  if (*what_to_do) text += " " + std::string(what_to_do);
  throw std::invalid_argument(text);
}

std::string describe(const Tensor& t) {
  if (!t.defined()) return "None";
  if (t.refused) return t.refused;
  return std::string(name(t.dtype)) + " " + shape_text(t.shape, t.ndim) + " on " + device_text(t);
}

void expect(const char* op, const char* argument, const Tensor& t, std::initializer_list<DType> dtypes,
            std::initializer_list<int64_t> shape, Layout layout, const Tensor* like) {
  auto expected = [&] { return expected_text(dtypes, shape); };
  if (!t.defined()) fail(op, argument, expected(), "None");
  if (t.refused) fail(op, argument, "a plain torch.Tensor, " + expected(), t.refused, "Pass a dense strided tensor.");
  bool dtype_ok = false;
  for (DType d : dtypes) dtype_ok |= d == t.dtype;
  bool shape_ok = t.ndim == static_cast<int>(shape.size());
  for (int i = 0; shape_ok && i < t.ndim; ++i) shape_ok = shape.begin()[i] == kAny || shape.begin()[i] == t.shape[i];
  if (!dtype_ok || !shape_ok) fail(op, argument, expected(), describe(t));
  // FakeTensor, DTensor and other wrapper subclasses pass every test above but carry no memory.
  if (!t.data && t.numel() > 0) {
    fail(op, argument, expected() + " with memory of its own",
         "a wrapper tensor without storage (FakeTensor, DTensor, …)",
         "For a DTensor pass t.to_local() or t.full_tensor(); a FakeTensor works only inside torch.compile.");
  }
  if (like && (t.device != like->device || t.device_index != like->device_index)) {
    fail(op, argument, "a tensor on " + device_text(*like), describe(t), "Move it with .to(device).");
  }
  bool layout_ok =
      layout == Layout::Strided || (layout == Layout::Contiguous && t.contiguous()) ||
      (layout == Layout::ContiguousRows && (t.numel() == 0 || t.size(t.ndim - 1) == 1 || t.stride(t.ndim - 1) == 1));
  if (!layout_ok) {
    std::string strides;
    for (int i = 0; i < t.ndim; ++i) strides += (i ? ", " : "") + std::to_string(t.stride(i));
    fail(op, argument, layout == Layout::Contiguous ? "a contiguous tensor" : "a last dimension of stride 1",
         "strides (" + strides + ")", "Call .contiguous() first.");
  }
}

void expect_workspace(const char* op, const Tensor& workspace, int64_t bytes, const Tensor& like) {
  expect(op, "workspace", workspace, {DType::UInt8}, {kAny}, Layout::Contiguous, &like);
  if (workspace.size(0) < bytes) {
    fail(op, "workspace", "at least " + std::to_string(bytes) + " bytes", std::to_string(workspace.size(0)));
  }
}

void expect_targets(const char* op, const Tensor& target, int64_t classes, int64_t ignore_index) {
  const int64_t* t = target.ptr<int64_t>();
  for (int64_t i = 0, n = target.numel(); i < n; ++i) {
    if (t[i] != ignore_index && (t[i] < 0 || t[i] >= classes)) {
      fail(op, "target",
           "class indices in [0, " + std::to_string(classes) + ") or ignore_index " + std::to_string(ignore_index),
           std::to_string(t[i]) + " at row " + std::to_string(i));
    }
  }
}

void expect_segments(const char* op, const Tensor& cu_seqlens, int64_t tokens) {
  const int32_t* cu = cu_seqlens.ptr<int32_t>();
  const int64_t s = cu_seqlens.size(0) - 1;
  if (cu[0] != 0) fail(op, "cu_seqlens", "0 as first element", std::to_string(cu[0]));
  for (int64_t i = 0; i < s; ++i) {
    if (cu[i + 1] < cu[i]) {
      fail(op, "cu_seqlens", "ascending positions",
           std::to_string(cu[i + 1]) + " after " + std::to_string(cu[i]) + " at index " + std::to_string(i + 1));
    }
  }
  if (cu[s] != tokens) {
    fail(op, "cu_seqlens", std::to_string(tokens) + " (the number of tokens) as last element", std::to_string(cu[s]),
         "Sequence i holds the tokens cu_seqlens[i] to cu_seqlens[i + 1].");
  }
}

void expect_transform(const char* op, float temperature, float softcap) {
  if (!(temperature > 0)) fail(op, "temperature", "a number above 0", std::to_string(temperature));
  if (!(softcap >= 0)) fail(op, "softcap", "a number above 0, or None", std::to_string(softcap));
}

}  // namespace fastpost
