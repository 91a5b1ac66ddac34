// SPDX-License-Identifier: Apache-2.0
// torch.Tensor -> fastpost::Tensor through DLPack's C exchange API: no torch headers, no copy, under 0.1 µs a tensor.
//
// The caster accepts every object and lets cpp/ops refuse it: a caster that says no makes nanobind raise a TypeError
// that names no argument.
#pragma once

#include <nanobind/nanobind.h>

#include "core/tensor.h"

namespace fastpost::dlpack {

// The part of DLPack 1.3 that is used here (dmlc/dlpack, include/dlpack/dlpack.h), as plain C layout.
struct Version {
  uint32_t major, minor;
};
struct DeviceId {
  int32_t type, id;
};
struct ElementType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct View {  // DLTensor
  void* data;
  DeviceId device;
  int32_t ndim;
  ElementType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct ExchangeApi {  // DLPackExchangeAPI
  Version version;
  void* previous;
  void* allocate;
  void* export_managed;
  void* import_managed;
  int (*view)(void* object, View* out);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

inline DType to_dtype(ElementType t) {
  switch (t.lanes == 1 ? t.code * 1000 + t.bits : -1) {
    case 2032: return DType::Float32;
    case 2064: return DType::Float64;
    case 4016: return DType::BFloat16;
    case 2016: return DType::Float16;
    case 64: return DType::Int64;
    case 32: return DType::Int32;
    case 8: return DType::Int8;
    case 1008: return DType::UInt8;
    case 6008: return DType::Bool;
    default: return DType::Other;
  }
}

// The exchange table of a type, or null. torch has one table for all its tensor types, so one slot of memory suffices.
inline const ExchangeApi* exchange_api(PyTypeObject* type) {
  static PyTypeObject* last_type = nullptr;
  static const ExchangeApi* last_api = nullptr;
  if (type == last_type) return last_api;
  const ExchangeApi* api = nullptr;
  if (PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__")) {
    api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    Py_DECREF(capsule);
    if (api && (api->version.major != 1 || !api->view)) api = nullptr;
  }
  PyErr_Clear();
  if (api) {
    Py_INCREF(type);  // the slot keeps the type alive, so that its address stays its own
    Py_XDECREF(last_type);
    last_type = type;
    last_api = api;
  }
  return api;
}

}  // namespace fastpost::dlpack

namespace nanobind::detail {

template <>
struct type_caster<fastpost::Tensor> {
  NB_TYPE_CASTER(fastpost::Tensor, const_name("torch.Tensor | None"))

  bool from_python(handle src, uint32_t, cleanup_list*) noexcept {
    namespace dl = fastpost::dlpack;
    value = fastpost::Tensor{};
    if (src.is_none()) return true;
    value.ndim = 0;
    const dl::ExchangeApi* api = dl::exchange_api(Py_TYPE(src.ptr()));
    if (!api) {
      value.refused = Py_TYPE(src.ptr())->tp_name;
      return true;
    }
    dl::View v;
    if (api->view(src.ptr(), &v) != 0) {
      PyErr_Clear();
      value.refused = "a tensor that DLPack cannot describe (sparse, quantised, conjugated or on an unknown device)";
      return true;
    }
    value.data = v.data ? static_cast<char*>(v.data) + v.byte_offset : nullptr;
    value.shape = v.shape;
    value.strides = v.strides;
    value.ndim = v.ndim;
    value.dtype = dl::to_dtype(v.dtype);
    constexpr int32_t kCpu = 1, kCuda = 2, kCudaHost = 3;
    if (v.device.type == kCuda) {
      value.device = fastpost::Device::CUDA;
      value.device_index = v.device.id;
      api->current_stream(kCuda, v.device.id, &value.stream);
    } else if (v.device.type != kCpu && v.device.type != kCudaHost) {
      value.device = fastpost::Device::Other;
      value.refused = "a tensor on a device that is neither CPU nor CUDA";
    }
    return true;
  }

  static handle from_cpp(const fastpost::Tensor&, rv_policy, cleanup_list*) noexcept { return none().release(); }
};

}  // namespace nanobind::detail
