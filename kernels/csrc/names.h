// The names of formats and activations, by which Python calls them (kernels/schema.py).
//
// The macros FORMATS (weights.h) and ACTIVATIONS (activation.h) list the names that C++ knows. NAMES_OF makes a string
// of such a list: "Unquantized, Int8, Int4".
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <string>
#include <string_view>

#define AS_STRING(...) #__VA_ARGS__
#define NAMES_OF(LIST) AS_STRING(LIST)

// Returns the index of name in names, or -1.
constexpr int64_t find_name(std::string_view names, std::string_view name) {
  for (int64_t index = 0;; index++) {
    const size_t end = names.find(", ");
    if (names.substr(0, end) == name) return index;
    if (end == std::string_view::npos) return -1;
    names.remove_prefix(end + 2);
  }
}

// Returns a string argument, and frees its handle. Operations take handles because PyTorch's conversion to std::string
// leaks memory with every call (version 2.13).
inline std::string take_string(StringHandle handle) {
  const char* chars = "";
  torch_string_c_str(handle, &chars);
  std::string result = chars;
  torch_delete_string(handle);
  return result;
}
