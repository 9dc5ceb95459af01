// explain MODEL.pt2 IMAGE.png MAP.png [CLASS]: writes where the network looked, and says which class it explains.
#include <png.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <ATen/ATen.h>
#include <iostream>
#include <sstream>

static std::vector<double> numbers(const std::string& text) {  // "0.485 0.456 0.406"
  std::istringstream stream(text);
  return {std::istream_iterator<double>(stream), {}};
}

static at::Tensor read_rgb(const char* path) {  // (3, H, W) in [0, 1]
  png_image image = {.version = PNG_IMAGE_VERSION};
  if (!png_image_begin_read_from_file(&image, path)) throw std::runtime_error(std::string(path) + ": " + image.message);
  image.format = PNG_FORMAT_RGB;
  auto pixels = at::empty({image.height, image.width, 3}, at::kByte);
  png_image_finish_read(&image, nullptr, pixels.data_ptr(), 0, nullptr);
  return pixels.permute({2, 0, 1}).to(at::kFloat) / 255;
}

static void write_grey(const char* path, const at::Tensor& map) {  // (H, W) in [0, 1]
  auto pixels = (map * 255).round().to(at::kCPU, at::kByte).contiguous();
  png_image image = {.version = PNG_IMAGE_VERSION,
                     .width = (png_uint_32)map.size(1),
                     .height = (png_uint_32)map.size(0),
                     .format = PNG_FORMAT_GRAY};
  if (!png_image_write_to_file(&image, path, 0, pixels.data_ptr(), 0, nullptr))
    throw std::runtime_error(std::string(path) + ": " + image.message);
}

// What the network was trained with: resize so that the image covers `resize`, crop `size` at the centre, normalise.
static at::Tensor preprocess(at::Tensor image, const std::unordered_map<std::string, std::string>& about) {
  if (!about.count("mean")) throw std::runtime_error("the file was exported without its preprocessing");
  auto size = numbers(about.at("size")), resize = about.at("resize").empty() ? size : numbers(about.at("resize"));
  auto scale = std::max(resize[0] / image.size(1), resize[1] / image.size(2));
  int64_t height = std::max(resize[0], image.size(1) * scale), width = std::max(resize[1], image.size(2) * scale);
  image = at::_upsample_bilinear2d_aa(image.unsqueeze(0), {height, width}, false);
  image = image.narrow(2, (height - size[0]) / 2, size[0]).narrow(3, (width - size[1]) / 2, size[1]);
  auto mean = at::tensor(numbers(about.at("mean"))).view({1, -1, 1, 1}), std = at::tensor(numbers(about.at("std")));
  return ((image - mean) / std.view({1, -1, 1, 1})).to(at::kFloat).contiguous();
}

int main(int argc, char** argv) try {
  if (argc < 4) throw std::runtime_error("usage: explain MODEL.pt2 IMAGE.png MAP.png [CLASS]");
  c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  auto about = model.get_metadata();
  auto classes = at::full({1}, argc > 4 ? std::stol(argv[4]) : -1L, at::kLong);  // -1: the top class
  at::Device device(about.at("device"));
  auto found = model.run({preprocess(read_rgb(argv[2]), about).to(device), classes.to(device)});
  write_grey(argv[3], found[1][0]);
  auto explained = found[2].item<int64_t>();
  std::cout << "class " << explained << ", logit " << found[0][0][explained].item<float>() << "\n";
} catch (const std::exception& error) {
  std::cerr << "explain: " << error.what() << "\n";
  return 1;
}
