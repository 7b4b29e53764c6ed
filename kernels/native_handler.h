// What every handler of an XLA call has around it.
#pragma once

#include <exception>

#include "xla/ffi/api/ffi.h"

namespace kvcascade {

namespace ffi = xla::ffi;

// A handler that answers an error where the given one throws: no exception may pass through XLA, which is compiled without them.
template <typename... Args>
auto Guarded(ffi::Error (*handler)(Args...)) {
  return [handler](Args... args) -> ffi::Error {
    try {
      return handler(std::move(args)...);
    } catch (const std::exception& error) {
      return ffi::Error(ffi::ErrorCode::kResourceExhausted, error.what());
    }
  };
}

}  // namespace kvcascade
