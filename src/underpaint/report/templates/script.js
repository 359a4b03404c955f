(function () {
  var section = document.getElementById('pictures');
  var slider = section && section.querySelector('.slider');
  if (slider) {
    var input = slider.querySelector('input'), output = slider.querySelector('output');
    var frames = section.querySelectorAll('.frame');
    slider.hidden = false;
    var show = function () {
      frames.forEach(function (frame, index) {
        frame.classList.toggle('shown', index === Number(input.value));
      });
      var label = frames[Number(input.value)].dataset.label;
      output.textContent = label;
      input.setAttribute('aria-valuetext', label);
    };
    input.addEventListener('input', show);
    show();
  }
  var opened = [];
  window.addEventListener('beforeprint', function () {
    opened = Array.from(document.querySelectorAll('details:not([open])'));
    opened.forEach(function (details) { details.open = true; });
  });
  window.addEventListener('afterprint', function () {
    opened.forEach(function (details) { details.open = false; });
  });
})();
